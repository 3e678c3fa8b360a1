"""The published EXAONE-4.0-1.2B shape with random bf16 weights, 2.6 GB: round trip, logits, and peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.recipes.published import CONFIGS
from tests.helpers.published import assert_published_passes, verify_published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exaone_bridge.checkpoint.hf.tiny import write_random

    folder = tmp_path_factory.mktemp("published") / "EXAONE-4.0-1.2B"
    write_random(folder, CONFIGS["exaone4_1p2b"])
    return folder


@pytest.mark.slow
def test_published_shape(published: Path, tmp_path: Path, record_property: Any) -> None:
    found = verify_published(published, tmp_path)
    record_property("figures", found)
    assert_published_passes(found)
    assert (
        found["setup"]["streaming"] and 0.5 < found["above_gib"] < 4
    )  # the weights alone have 2.4 in bf16, 4.8 in fp32
