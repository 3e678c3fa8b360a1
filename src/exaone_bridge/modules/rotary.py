"""RoPE whose every Llama 3 field counts.

Megatron-Core's `RotaryEmbedding` hands only `factor` to its scaling, and has 1, 4 and 8192 for the others.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

__all__ = ["Llama3RotaryEmbedding"]


class Llama3RotaryEmbedding(RotaryEmbedding):
    """Frequencies scaled as `transformers.modeling_rope_utils._compute_llama3_parameters` does.

    Args:
        factor: divides the frequencies whose wavelength exceeds original_max_positions / low_freq_factor.
        low_freq_factor, high_freq_factor: the wavelengths, as divisors of original_max_positions, between which
            scaled and unscaled frequencies are blended.
        original_max_positions: tokens, before the context was extended.
        others: `RotaryEmbedding`'s own.
    """

    def __init__(
        self,
        *,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_positions: int,
        **others: Any,
    ) -> None:
        super().__init__(rope_scaling=False, **others)
        self.inv_freq: torch.Tensor = self._apply_scaling(
            self.inv_freq,
            factor=factor,
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            original_max_position_embeddings=original_max_positions,
        )
