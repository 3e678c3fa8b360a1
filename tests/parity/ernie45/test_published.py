"""The published ERNIE-4.5-0.3B shape with random bf16 weights (0.7 GB)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.published import verify_published


@pytest.mark.slow
def test_published_shape_passes_in_5_gib(tmp_path: Path, record_property: Any) -> None:
    measured = verify_published("ernie45_0p3b", tmp_path, record_property)
    assert 0.5 < measured.above_gib < 5
