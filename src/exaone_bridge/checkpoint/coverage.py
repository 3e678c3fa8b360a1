"""The one check that both sides of a conversion have the same names. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from exaone_bridge.errors import UnmappedTensors

__all__ = ["BUILD_FROM_CONFIG", "check_coverage"]

BUILD_FROM_CONFIG = (
    "the provider must build the model that the Hugging Face configuration describes"
)


def check_coverage(
    expected: Iterable[str],
    found: Iterable[str],
    *,
    where: str | Path,
    remedy: str = "check that config.json belongs to these weights, or download them again",
) -> None:
    """Raise if the parameter mappings and a checkpoint or model do not have the same names.

    Args:
        expected: The names that the parameter mappings of the model cover.
        found: The names that the checkpoint or the model has.
        where: The folder or model that was looked at.
        remedy: What the user can do.

    Raises:
        UnmappedTensors: Keys are missing, or there are unexpected keys.
    """
    expected, found = set(expected), set(found)
    if missing := expected - found:
        raise UnmappedTensors("missing keys", missing, where=str(where), remedy=remedy)
    if unexpected := found - expected:
        raise UnmappedTensors("unexpected keys", unexpected, where=str(where), remedy=remedy)
