"""The published EXAONE-4.0-1.2B shape with random bf16 weights (2.6 GB)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.published import verify_published


@pytest.mark.slow
def test_published_shape_passes_layer_by_layer_in_4_gib(
    tmp_path: Path, record_property: Any
) -> None:
    """The weights alone are 2.4 GiB in bf16, and 4.8 GiB in fp32."""
    measured = verify_published("exaone4_1p2b", tmp_path, record_property)
    assert measured.layerwise and 0.5 < measured.above_gib < 4
