"""Sizes as text. No torch."""

from __future__ import annotations

__all__ = ["size_text"]

_UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3}


def size_text(nbytes: float) -> str:
    """Return a size such as `474.20 GB` or `1.38 MB`, in the largest unit that it has one of."""
    for unit, size in _UNITS.items():
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"
