"""A size has the unit that fits it: a tiny model is not 0.00 GB."""

from __future__ import annotations

import pytest

from exaone_bridge.schema.size_text import size_text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_383_680, "1.38 MB"), (474_200_000_000, "474.20 GB")],
)
def test_size_has_the_unit_that_fits(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text
