"""The difference at every place of the arithmetic, drawn: a PNG. Needs Pillow, which Megatron-Bridge brings along."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from exaone_bridge.verification.activations.probe_points import VISION_PREFIX
from exaone_bridge.verification.report.report import ActivationDiff

__all__ = ["differences_png"]

WIDTH, HEIGHT = 1120, 460
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 64, 66  # margins around the plotting area, in pixels
SCALE = 2  # drawn twice as large, for sharp screens

INK, MUTED, GRID, BAND = "#1f2328", "#59636e", "#e4e7eb", "#f5f7f9"
WITHIN, BEYOND, BOUND = "#1769aa", "#c62828", "#8a949e"
MARKS = {  # sublayer -> shape: colour alone does not tell them apart
    "embedding": "diamond",
    "norm": "ring",
    "attention": "disc",
    "router": "triangle",
    "mlp": "square",
    "layer": "tick",
    "output layer": "diamond",
}


def differences_png(places: Sequence[ActivationDiff]) -> bytes:
    """One mark a place, from the embeddings to the logits; the line is the bound. Logarithmic; equal is the floor.

    Args:
        places: in the order of the arithmetic; at least one.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    canvas = _Canvas(ImageDraw.Draw(image))
    low, high = _decades(places)

    def y(value: float) -> float:
        """NaN and infinity stand at the top, zero at the bottom."""
        value = value if value - value == 0 else 10.0**high
        at = min(max(math.log10(value), low), high) if value > 0 else low
        return TOP + (high - at) / (high - low) * (HEIGHT - TOP - BOTTOM)

    step = (WIDTH - LEFT - RIGHT) / len(places)
    xs = [LEFT + step * (number + 0.5) for number in range(len(places))]
    _axes(canvas, places, step, low, high, y)
    canvas.line([(x, y(place.threshold)) for x, place in zip(xs, places, strict=True)], BOUND, 1.6)
    first = next((number for number, place in enumerate(places) if place.diverges), None)
    for number, (x, place) in enumerate(zip(xs, places, strict=True)):
        size = 3.4 if step > 7 else 2.4
        canvas.mark(
            _shape(place), x, y(place.difference), size, BEYOND if place.diverges else WITHIN
        )
        if number == first:
            canvas.line([(x, TOP), (x, HEIGHT - BOTTOM)], BEYOND, 1.2)
            name = (
                place.sublayer if place.layer is None else f"layer {place.layer}, {place.sublayer}"
            )
            canvas.text(
                x, TOP - 4, f"parts here: {name}", BEYOND, 12, "lb" if x < WIDTH / 2 else "rb"
            )
    _legend(canvas)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _shape(place: ActivationDiff) -> str:
    """A tower's sublayers have the shapes of the language model's."""
    return MARKS.get(place.sublayer.removeprefix(VISION_PREFIX), "diamond")


class _Canvas:
    """Drawing in unscaled pixels."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        self.draw.line(
            [(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=round(width * SCALE)
        )

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle([left * SCALE, top * SCALE, right * SCALE, bottom * SCALE], fill=colour)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        colour: str = MUTED,
        size: float = 11,
        anchor: str = "mm",
    ) -> None:
        from PIL import ImageFont

        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, fill=colour, font=font, anchor=anchor)

    def mark(self, shape: str, x: float, y: float, size: float, colour: str) -> None:
        x, y, r = x * SCALE, y * SCALE, size * SCALE
        match shape:
            case "disc":
                self.draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)
            case "ring":
                self.draw.ellipse(
                    [x - r, y - r, x + r, y + r], fill="white", outline=colour, width=SCALE
                )
            case "square":
                self.draw.rectangle([x - r, y - r, x + r, y + r], fill=colour)
            case "triangle":
                self.draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=colour)
            case "diamond":
                self.draw.polygon(
                    [(x, y - 1.3 * r), (x + 1.3 * r, y), (x, y + 1.3 * r), (x - 1.3 * r, y)],
                    fill=colour,
                )
            case _:
                self.draw.line(
                    [x - 1.4 * r, y, x + 1.4 * r, y], fill=colour, width=round(1.5 * SCALE)
                )


def _decades(places: Sequence[ActivationDiff]) -> tuple[int, int]:
    """Whole powers of ten around what is drawn; what is equal stands on the lowest."""
    values = [
        value
        for place in places
        for value in (place.difference, place.threshold)
        if 0 < value < float("inf")
    ]
    if not values:
        return -8, 0
    return math.floor(math.log10(min(values))) - 1, max(math.ceil(math.log10(max(values))), -3)


def _axes(
    canvas: _Canvas, places: Sequence[ActivationDiff], step: float, low: int, high: int, y: Any
) -> None:
    layers = [place.layer for place in places]
    numbers = sorted({layer for layer in layers if layer is not None})
    every = max(1, math.ceil(len(numbers) / 32))
    for layer in numbers:
        start = LEFT + step * layers.index(layer)
        end = start + step * layers.count(layer)
        if layer % 2 == 0:
            canvas.box(start, TOP, end, HEIGHT - BOTTOM, BAND)
        if layer % every == 0:
            canvas.text((start + end) / 2, HEIGHT - BOTTOM + 13, str(layer))
    vision_encoder = [
        number for number, place in enumerate(places) if place.sublayer.startswith(VISION_PREFIX)
    ]
    if vision_encoder:
        start, end = LEFT + step * vision_encoder[0], LEFT + step * (vision_encoder[-1] + 1)
        canvas.line([(start, HEIGHT - BOTTOM + 6), (end, HEIGHT - BOTTOM + 6)], BOUND, 1.2)
        canvas.text((start + end) / 2, HEIGHT - BOTTOM + 16, "tower")
    for power in range(low, high + 1):
        at = y(10.0**power)
        canvas.line([(LEFT, at), (WIDTH - RIGHT, at)], GRID, 0.8)
        canvas.text(LEFT - 8, at, "equal" if power == low else f"1e{power}", anchor="rm")
    canvas.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 30, "layer", INK, 12)
    canvas.text(LEFT - 60, 18, "Relative difference at each place of the arithmetic", INK, 14, "lm")


def _legend(canvas: _Canvas) -> None:
    x, y = LEFT - 60.0, HEIGHT - 14
    for name, shape in MARKS.items():
        if name == "output layer":
            continue  # the embedding's mark, at the other end
        canvas.mark(shape, x + 5, y, 3.6, WITHIN)
        label = "embedding, output layer" if name == "embedding" else name
        canvas.text(x + 15, y, label, MUTED, 11, "lm")
        x += 34 + 6.4 * len(label)
    canvas.line([(x, y), (x + 22, y)], BOUND, 1.6)
    canvas.text(x + 28, y, "bound", MUTED, 11, "lm")
    canvas.mark("disc", x + 92, y, 3.6, BEYOND)
    canvas.text(x + 102, y, "beyond it", MUTED, 11, "lm")
