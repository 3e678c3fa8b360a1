"""Predicts how far rounding alone drives two correct fp32 programs apart. No torch is imported.

docs/verification.md derives the formulas. A sum of n products has a relative error of about
u sqrt(n), u the unit roundoff; the errors of different sums are independent and add in squares.
How much a model amplifies an error on its way is measured on the model itself.
"""

from __future__ import annotations

import math

from exaone_bridge.schema.model_config import ModelConfig, VisionConfig
from exaone_bridge.verification.activations.probe_points import VISION_PREFIX

__all__ = ["HALF_PRECISION_RATIO", "MAX_THRESHOLD", "UNIT_ROUNDOFF", "RoundingModel"]

UNIT_ROUNDOFF = 2.0**-24  # of fp32, round to nearest
MAX_THRESHOLD = 2.0**-9  # a model that amplifies rounding further fails: a fault could hide in it
HALF_PRECISION_RATIO = 1.1  # of distances to fp32, which two runs of one dtype have in common
_VISION_THETA = 1e4  # transformers 5.12.1, Exaone4_5_VisionRotaryEmbedding


class RoundingModel:
    """Counts the terms of the sums on the way to each activation of a model.

    `terms` adds up the lengths of all sums, one after the other, between the embeddings and an
    activation; `threshold` turns it into the largest difference that rounding explains.
    """

    def __init__(self, model_config: ModelConfig, length: int) -> None:
        """Take the sizes from the config.

        Args:
            length: tokens of the longest prompt.
        """
        dims = model_config.dims
        self._config, self._length = model_config, length
        self._mlp_width = max(dims.get(axis, 0) for axis in "FMA")
        self._hidden, self._head_dim, self._queries = dims["H"], dims["D"], dims["Q"]
        self._experts = dims.get("E", 0)
        self._vision = model_config.vision

    def terms(self, sublayer: str, layer: int | None = None, block: int | None = None) -> float:
        """Count the terms on the way to an activation.

        Args:
            sublayer: as `ActivationDiff` has it.
            layer: the decoder layer; None outside the layers.
            block: of a vision encoder.
        """
        if sublayer.startswith(VISION_PREFIX):
            assert self._vision is not None
            return self._vision_terms(self._vision, sublayer.removeprefix(VISION_PREFIX), block)
        if sublayer == "embedding":
            return 1.0
        if layer is None:  # the final norm and the output layer
            return self.terms("layer", self._config.num_layers - 1) + 2 * self._hidden
        before = sum(self._attention(each) + self._mlp() for each in range(layer))
        mlp = 0.0 if sublayer == "attention" else self._mlp()
        return self._vision_encoder() + before + self._attention(layer) + mlp

    def threshold(self, terms: float, amplification: float) -> float:
        """Return the largest relative difference of two fp32 programs that sum in another order.

        Args:
            amplification: relative change of the activation for a relative change of one in the
                embeddings.

        Returns:
            sqrt(2) u sqrt(terms) amplification, at most `MAX_THRESHOLD`.
        """
        rounding = math.sqrt(2) * UNIT_ROUNDOFF * math.sqrt(terms)
        return min(MAX_THRESHOLD, rounding * max(1.0, amplification))

    def _attention(self, layer: int) -> float:
        """Count norms, projections, scores, softmax, values, output projection and RoPE."""
        window = self._config.windows[layer]
        keys = self._length if window is None else min(window, self._length)
        # An angle is position x frequency, rounded once, which is an error of u x angle; its mean
        # square over the frequencies theta^-2x, 0 <= x < 1, is length^2 / (2 ln theta).
        angles = (
            self._length**2 / (2 * math.log(max(self._config.rope_theta, 2.0)))
            if self._config.rope[layer]
            else 0.0
        )
        return 3 * self._hidden + 2 * self._head_dim + 2 * keys + self._queries + angles

    def _mlp(self) -> float:
        return 4 * self._hidden + self._mlp_width + self._experts

    def _vision_encoder(self) -> float:
        return 0.0 if self._vision is None else self._vision_terms(self._vision, "merger", None)

    def _vision_terms(self, vision: VisionConfig, sublayer: str, block: int | None) -> float:
        if sublayer == "embedding":
            return float(vision.patch_elements)
        if block is None:  # the merger and the features
            last = self._vision_terms(vision, "layer", vision.depth - 1)
            return last + vision.hidden_size * (1 + 2 * vision.merge_size**2)
        mlp = 2 * vision.hidden_size + vision.ffn_size
        before = sum(self._vision_attention(vision, each) + mlp for each in range(block))
        own = self._vision_attention(vision, block) + (0 if sublayer == "attention" else mlp)
        return float(vision.patch_elements + before + own)

    def _vision_attention(self, vision: VisionConfig, block: int) -> float:
        patches = self._length * vision.merge_size**2  # at most: one image that fills the prompt
        window = min((vision.window_size // vision.patch_size) ** 2, patches)
        keys = patches if block in vision.full_attention else window
        # RoPE is applied to rows and columns, of which a square has the root of its patches.
        angles = patches / (2 * math.log(_VISION_THETA))
        return 3 * vision.hidden_size + 2 * vision.head_dim + 2 * keys + angles
