"""The published ERNIE-4.5-0.3B shape with random bf16 weights, 0.7 GB: round trip, and logits of 64 positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.recipes.published import CONFIGS
from tests.helpers.published import assert_published_passes, verify_published


@pytest.mark.slow
def test_published_shape(tmp_path: Path, record_property: Any) -> None:
    from exaone_bridge.checkpoint.hf.tiny import write_random

    folder = tmp_path / "ERNIE-4.5-0.3B"
    write_random(folder, CONFIGS["ernie45_0p3b"])
    found = verify_published(folder, tmp_path)
    record_property("figures", found)
    assert_published_passes(found)
    assert 0.5 < found["above_gib"] < 5
