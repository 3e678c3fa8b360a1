"""Formats numbers for people, as HTML or plain text. No torch is imported."""

from __future__ import annotations

import math
import re

__all__ = ["TIMES", "count", "duration", "nearness", "number", "power_of_ten", "readable"]

_SCIENTIFIC = re.compile(r"\b(\d(?:\.\d+)?e[+-]\d+)\b")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
TIMES = "\u00d7"
_UNITS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def number(value: float) -> str:
    """Return two significant digits: 0.36, 1,200, 4.5 x 10⁻⁶."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    if 1e-2 <= abs(value) < 1e6:
        return f"{float(f'{value:.1e}'):,.10g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} {TIMES} {power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """Return 10⁻⁶; 1 for the exponent 0."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}" if exponent else "1"


def readable(text: str) -> str:
    """Rewrite the numbers of a sentence that are in the form 4.5e-06."""
    return _SCIENTIFIC.sub(lambda found: number(float(found[1])), text)


def count(value: int) -> str:
    """Return 345,920 or 1.28 billion."""
    for unit, name in _UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Return 4.2 s, 48 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def nearness(share: float, *, of: bool = False) -> str:
    """Return how near a difference is to its threshold: 7% or 120 times.

    Args:
        share: the difference divided by the threshold.
        of: add of what: 7% of the threshold, 120 times the threshold.
    """
    if math.isnan(share):
        return "NaN"
    if share > 1:
        return f"{number(share)} times" + " the threshold" * of
    percent = f"{share:.0%}" if share == 0 or share >= 0.01 else "under 1%"
    return percent + " of the threshold" * of
