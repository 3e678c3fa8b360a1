"""How far apart two correct programs may be: the error model that docs/verification.md derives. No torch.

A sum of n products rounds to a relative error of about u sqrt(n), u the unit roundoff; errors of different sums are
independent and add in squares; what a layer does to an error that comes in is measured on the model itself.
"""

from __future__ import annotations

import math
from typing import Any

__all__ = ["BF16_RATIO", "UNIT_ROUNDOFF", "RoundingModel"]

UNIT_ROUNDOFF = 2.0**-24  # of fp32, to nearest
CEILING = (
    2.0**-9
)  # a model that amplifies rounding beyond this cannot be verified in fp32, and does not hold
_VISION_THETA = 1e4  # Transformers' `Exaone4_5_VisionRotaryEmbedding`
BF16_RATIO = 1.1  # of distances from fp32: two runs of one precision are that far from each other


class RoundingModel:
    """Expected relative rounding error of fp32 after each place of one model.

    Args:
        facts: of the family.
        length: positions of the longest prompt.
    """

    def __init__(self, model_config: Any, length: int) -> None:
        dims = model_config.dims
        self.model_config, self.length = model_config, length
        self.wide = max(dims.get(axis, 0) for axis in "FMA")
        self.hidden, self.head = dims["H"], dims["D"]
        self.heads = dims["Q"]
        self.experts = dims.get("E", 0)

    def _attention(self, layer: int) -> float:
        """Terms of the sums one after the other: norms, projections, scores, softmax, values, projection, norm."""
        window = self.model_config.windows[layer]
        keys = self.length if window is None else min(window, self.length)
        # An angle is position x frequency, rounded once: an error of u x angle, mean square over the frequencies
        # theta^-2x, 0 <= x < 1.
        angles = (
            self.length**2 / (2 * math.log(max(self.model_config.rope_theta, 2.0)))
            if self.model_config.rope[layer]
            else 0.0
        )
        return 2 * self.hidden + self.hidden + 2 * self.head + 2 * keys + self.heads + angles

    def _mlp(self) -> float:
        return 2 * self.hidden + 2 * self.hidden + self.wide + self.experts

    def _vision_encoder(self) -> float:
        """Of a vision tower, whose features take the place of words: patches, each block, and the merger after them."""
        return 0.0 if self.model_config.vision is None else self.vision_terms(None, "merger")

    def vision_terms(self, block: int | None, sublayer: str) -> float:
        """Terms summed on the way to this place of a vision tower: of its embedding, of a block, or of its merger."""
        vision = self.model_config.vision
        if sublayer == "embedding":
            return float(vision.patch_elements)
        if block is None:
            last = self.vision_terms(vision.depth - 1, "layer")
            return last + vision.hidden_size * (1 + 2 * vision.merge_size**2)
        before = vision.patch_elements + sum(
            self._block_attention(each) + self._block_mlp() for each in range(block)
        )
        return float(
            before
            + self._block_attention(block)
            + (0 if sublayer == "attention" else self._block_mlp())
        )

    def _block_attention(self, block: int) -> float:
        vision = self.model_config.vision
        patches = self.length * vision.merge_size**2  # of one image in all places, at most
        window = min((vision.window_size // vision.patch_size) ** 2, patches)
        keys = patches if block in vision.full_attention else window
        # Rows and columns are rotated, and a square has as many as the root of its patches.
        angles = patches / (2 * math.log(_VISION_THETA))
        return 3 * vision.hidden_size + 2 * vision.head_dim + 2 * keys + angles

    def _block_mlp(self) -> float:
        return 2 * self.model_config.vision.hidden_size + self.model_config.vision.ffn_size

    def terms(self, layer: int | None, sublayer: str, is_last: bool = False) -> float:
        """Terms summed on the way to this place; outside the layers, `is_last` tells the end from the embedding."""
        if layer is None:
            if not is_last:
                return 1.0
            return self.terms(self.model_config.num_layers - 1, "layer") + 2 * self.hidden
        before = self._vision_encoder() + sum(
            self._attention(each) + self._mlp() for each in range(layer)
        )
        here = self._attention(layer) + (0 if sublayer == "attention" else self._mlp())
        return before + here

    def threshold(self, terms: float, amplification: float) -> float:
        """The largest relative difference of two fp32 programs that differ in nothing but the order of their sums.

        Never above the ceiling: a fault may not hide behind a model that amplifies everything.
        """
        return min(
            CEILING, math.sqrt(2) * UNIT_ROUNDOFF * math.sqrt(terms) * max(1.0, amplification)
        )
