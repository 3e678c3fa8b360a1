"""Draws the differences of all activations as one SVG image. No torch is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from exaone_bridge.verification.activations.probe_points import VISION_PREFIX
from exaone_bridge.verification.report.report import ActivationDiff

__all__ = ["activation_plot"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 1100, 40, 400  # the plotting area
_WITHIN, _ABOVE, _THRESHOLD, _TEXT = "#1769aa", "#c62828", "#8a949e", "#59636e"


def activation_plot(activations: Sequence[ActivationDiff]) -> str:
    """Draw one dot for each activation, from embeddings to logits, and the threshold as a line.

    The vertical axis is logarithmic: zero is at the bottom, NaN and infinity are at the top. The
    tooltip of a dot names its activation.

    Args:
        activations: in execution order; at least one.
    """
    values = [value for each in activations for value in (each.difference, each.threshold)]
    values = [value for value in values if 0 < value < math.inf] or [1e-7]
    low = math.floor(math.log10(min(values))) - 1
    high = max(math.ceil(math.log10(max(values))), -3)
    step = (_RIGHT - _LEFT) / len(activations)

    def x(number: float) -> float:
        return round(_LEFT + step * number, 1)

    def y(value: float) -> float:
        decade = high if not value < math.inf else math.log10(value) if value > 0 else low
        return round(_TOP + (high - decade) / (high - low) * (_BOTTOM - _TOP), 1)

    parts = [_text(_LEFT, 20, "relative difference of each activation", "start")]
    layers = [each.layer for each in activations]
    numbers = sorted({layer for layer in layers if layer is not None})
    for layer in numbers:
        begin, width = layers.index(layer), layers.count(layer)
        if layer % 2 == 0:
            area = f'width="{step * width:.1f}" height="{_BOTTOM - _TOP}" fill="#f5f7f9"'
            parts.append(f'<rect x="{x(begin)}" y="{_TOP}" {area}/>')
        if layer % math.ceil(len(numbers) / 32) == 0:
            parts.append(_text(x(begin + width / 2), _BOTTOM + 18, str(layer)))
    vision = [n for n, each in enumerate(activations) if each.sublayer.startswith(VISION_PREFIX)]
    if vision:
        middle = (vision[0] + vision[-1] + 1) / 2
        parts.append(_text(x(middle), _BOTTOM + 18, "vision encoder"))
    for decade in range(low, high + 1):
        at = y(10.0**decade)
        parts.append(f'<path d="M{_LEFT} {at}H{_RIGHT}" stroke="#e4e7eb"/>')
        parts.append(_text(_LEFT - 8, at + 4, "equal" if decade == low else f"1e{decade}", "end"))
    line = " ".join(f"{x(n + 0.5)},{y(each.threshold)}" for n, each in enumerate(activations))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_THRESHOLD}" stroke-width="2"/>')
    for number, each in enumerate(activations):
        colour = _ABOVE if each.diverges else _WITHIN
        where = each.sublayer if each.layer is None else f"layer {each.layer}, {each.sublayer}"
        title = f"{where} ({each.name}): {each.difference:.1e}, threshold {each.threshold:.1e}"
        parts.append(
            f'<circle cx="{x(number + 0.5)}" cy="{y(each.difference)}" r="3" fill="{colour}">'
            f"<title>{escape(title)}</title></circle>"
        )
    for at, colour, label in (
        (_LEFT, _WITHIN, "within the threshold"),
        (_LEFT + 160, _ABOVE, "above it"),
        (_LEFT + 250, _THRESHOLD, "threshold"),
    ):
        parts.append(f'<rect x="{at}" y="{_BOTTOM + 42}" width="12" height="5" fill="{colour}"/>')
        parts.append(_text(at + 18, _BOTTOM + 49, label, "start"))
    parts.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 34, "layer"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1120 460" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{_TEXT}">{escape(text)}</text>'
