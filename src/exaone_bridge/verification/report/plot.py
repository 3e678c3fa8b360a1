"""Draws the differences of all activations as one SVG image. No torch is imported.

Horizontal positions are in percent and vertical ones in pixels, so that the image fits any width
without scaling its text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from exaone_bridge.verification.activations.probe_points import VISION_PREFIX
from exaone_bridge.verification.report.numbers import nearness, number, power_of_ten
from exaone_bridge.verification.report.report import ActivationDiff

__all__ = ["activation_plot", "legend", "plot_image"]

_TOP, _BOTTOM, _HEIGHT = 12, 292, 320  # of the plotting area, and of the image, in pixels
_MAX_LAYER_LABELS = 12
_STYLE = """
.plot { --within: #0860c4; --above: #cf222e; --line: #6e7781; --grid: #d8dee4; --band: #f4f6f8;
  --label: #57606a; --paper: #fff; font: 12px system-ui, sans-serif; overflow: visible; }
@media (prefers-color-scheme: dark) { .plot { --within: #58a6ff; --above: #ff7b72; --line: #8b949e;
  --grid: #30363d; --band: #161b22; --label: #9198a1; --paper: #0d1117; } }
.plot text { fill: var(--label); } .plot .end { text-anchor: end; }
.plot .middle { text-anchor: middle; } .plot .paper { fill: var(--paper); }
.plot .band { fill: var(--band); } .plot .grid { stroke: var(--grid); }
.plot .threshold { fill: none; stroke: var(--line); stroke-width: 2;
  vector-effect: non-scaling-stroke; }
.plot .within { fill: var(--within); } .plot .above { fill: var(--above); }
"""


def activation_plot(activations: Sequence[ActivationDiff]) -> str:
    """Draw one dot for each activation, from embeddings to logits, and the threshold as a line.

    The vertical axis is logarithmic: zero is at the bottom, NaN and infinity are at the top. The
    title of a dot has its values.

    Args:
        activations: in execution order; at least one.
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="100%" height="{_HEIGHT}" '
        f'role="img" aria-label="relative difference of each activation">'
        f"<style>{_STYLE}</style>{_drawing(activations)}</svg>"
    )


def plot_image(activations: Sequence[ActivationDiff], width: int = 860) -> str:
    """Draw the plot with its axis labels and legend as an image of its own.

    Args:
        activations: in execution order; at least one.
        width: in pixels.
    """
    height, left = _HEIGHT + 30, 56
    parts, x = [], float(left)
    for kind, text in legend(activations):
        if kind not in ("within", "above", "threshold"):
            continue
        mark = (
            f'<path class="threshold" d="M{x - 5} {height - 12}h14"/>'
            if kind == "threshold"
            else f'<circle class="{kind}" cx="{x + 4}" cy="{height - 12}" r="4"/>'
        )
        parts.append(f'{mark}<text x="{x + 15}" y="{height - 8}">{escape(text)}</text>')
        x += 45 + 6.2 * len(text)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{width}" height="{height}"/>'
        f'<svg x="{left}" y="4" width="{width - left - 12}" height="{_HEIGHT}" '
        f'overflow="visible">{_drawing(activations)}</svg>{"".join(parts)}</svg>\n'
    )


def legend(activations: Sequence[ActivationDiff]) -> list[tuple[str, str]]:
    """Return the kind and the meaning of each mark that the plot of these activations has."""
    above = sum(each.diverges for each in activations)
    within = len(activations) - above
    entries = [
        ("within", f"{within} within the threshold", within > 0),
        ("above", f"{above} above it", above > 0),
        ("threshold", "threshold: the most that rounding explains", True),
        ("band", "every other layer", any(each.layer == 0 for each in activations)),
    ]
    return [(kind, text) for kind, text, present in entries if present]


def _drawing(activations: Sequence[ActivationDiff]) -> str:
    values = [value for each in activations for value in (each.difference, each.threshold)]
    values = [value for value in values if 0 < value < math.inf] or [1e-7]
    low = math.floor(math.log10(min(values))) - 1
    high = max(math.ceil(math.log10(max(values))), -3)
    step = 100 / len(activations)

    def y(value: float) -> float:
        decade = high if not value < math.inf else math.log10(value) if value > 0 else low
        return round(_TOP + (high - decade) / (high - low) * (_BOTTOM - _TOP), 1)

    parts = list(_layers(activations, step))
    every = math.ceil((high - low) / 8)
    for decade in range(low, high + 1):
        if (decade - low) % every == 0:
            at = y(10.0**decade)
            label = "equal" if decade == low else power_of_ten(decade)
            parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
            parts.append(f'<text class="end" x="-8" y="{at + 4}">{label}</text>')
    points = " ".join(f"{n + 0.5},{y(each.threshold)}" for n, each in enumerate(activations))
    parts.append(
        f'<svg width="100%" height="{_HEIGHT}" viewBox="0 0 {len(activations)} {_HEIGHT}" '
        f'preserveAspectRatio="none"><polyline class="threshold" points="{points}"/></svg>'
    )
    for index, each in enumerate(activations):
        where = each.sublayer if each.layer is None else f"layer {each.layer}, {each.sublayer}"
        title = (
            f"{where} ({each.name}): difference {number(each.difference)}, "
            f"threshold {number(each.threshold)}, {nearness(each.share, of=True)}"
        )
        parts.append(
            f'<circle class="{"above" if each.diverges else "within"}" r="3.5" '
            f'cx="{step * (index + 0.5):.2f}%" cy="{y(each.difference)}">'
            f"<title>{escape(title)}</title></circle>"
        )
    return "".join(parts)


def _layers(activations: Sequence[ActivationDiff], step: float) -> list[str]:
    """Draw a band behind every other layer, the layers' numbers, and the vision encoder's name."""
    layers = [each.layer for each in activations]
    numbers = sorted({layer for layer in layers if layer is not None})
    parts = []
    for layer in numbers:
        begin, width = layers.index(layer), layers.count(layer)
        if layer % 2 == 0:
            parts.append(
                f'<rect class="band" x="{step * begin:.2f}%" width="{step * width:.2f}%" '
                f'y="{_TOP}" height="{_BOTTOM - _TOP}"/>'
            )
        if layer % math.ceil(len(numbers) / _MAX_LAYER_LABELS) == 0:
            text = str(layer) if layer else "layer 0"
            parts.append(_label(step * (begin + width / 2), text))
    vision = [n for n, each in enumerate(activations) if each.sublayer.startswith(VISION_PREFIX)]
    if vision:
        parts.append(_label(step * (vision[0] + vision[-1] + 1) / 2, "vision encoder"))
    return parts


def _label(percent: float, text: str) -> str:
    return f'<text class="middle" x="{percent:.2f}%" y="{_BOTTOM + 18}">{text}</text>'
