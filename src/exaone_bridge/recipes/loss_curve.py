"""Draws the loss of a training run as an SVG image. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["loss_curve"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 320, 56, 32
_STYLE = """
svg { font: 12px system-ui, sans-serif; } text { fill: #57606a; } .grid { stroke: #d8dee4; }
.step { fill: none; stroke: #0860c4; stroke-opacity: .35; }
.mean { fill: none; stroke: #0860c4; stroke-width: 2; }
@media (prefers-color-scheme: dark) { text { fill: #9198a1; } .grid { stroke: #30363d; }
  .step, .mean { stroke: #58a6ff; } }
"""


def loss_curve(points: Sequence[tuple[int, float]]) -> str:
    """Draw the loss of each step, and its running mean over a twentieth of the steps.

    Args:
        points: step and loss. A step that was repeated after a resumption counts once, the last
            time; losses that are not finite are left out.
    """
    finite = {step: loss for step, loss in points if math.isfinite(loss)}
    steps, losses = sorted(finite), [finite[step] for step in sorted(finite)]
    if not steps:
        return _image("<text x='10' y='20'>no finite loss</text>")
    low, high = min(losses), max(losses)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def at(step: float, loss: float) -> str:
        x = _LEFT + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (_WIDTH - _LEFT - 12)
        y = 12 + (high - loss) / (high - low) * (_HEIGHT - _BOTTOM - 12)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tenth in range(0, 11, 2):
        value = low + (high - low) * tenth / 10
        y = at(steps[0], value).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">{value:.3g}</text>')
    for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1])):
        x = at(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="middle">{step}</text>')
    line = " ".join(at(step, loss) for step, loss in zip(steps, losses, strict=True))
    parts.append(f'<polyline class="step" points="{line}"/>')
    window = max(1, len(steps) // 20)
    means = [
        sum(losses[max(0, index - window + 1) : index + 1]) / min(index + 1, window)
        for index in range(len(losses))
    ]
    line = " ".join(at(step, mean) for step, mean in zip(steps, means, strict=True))
    parts.append(f'<polyline class="mean" points="{line}"/>')
    parts.append(f"<title>loss of {len(steps)} steps, the last {losses[-1]:.4f}</title>")
    return _image("".join(parts))


def _image(content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" role="img"><style>{_STYLE}</style>{content}</svg>\n'
    )
