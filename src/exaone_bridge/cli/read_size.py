"""Reads sizes with units. Imports no torch."""

from __future__ import annotations

import re

from exaone_bridge.errors import UnsupportedConfig

__all__ = ["read_size"]

_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def read_size(text: str, option: str) -> int:
    """Return the number of bytes of a text such as `5GB`, `500 MiB` or `1000000`.

    Args:
        text: a number with a unit (KB, MB, GB, TB, KiB, MiB, GiB) or without one.
        option: the option that the text belongs to, for the error message.

    Raises:
        UnsupportedConfig: the text is not a size, or the size is less than one byte.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) *([A-Z]*)", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        wanted = "a number of bytes, such as 5GB or 500MiB"
        raise UnsupportedConfig(option, got=text, wanted=wanted, where="command line")
    return size
