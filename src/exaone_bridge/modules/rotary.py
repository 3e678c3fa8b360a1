"""RoPE with all fields of Llama 3's scaling.

Megatron-Core 0.19.2's `RotaryEmbedding` (`models/common/embeddings/rotary_pos_embedding.py`) passes
only `factor` to its scaling, and uses 1, 4 and 8192 for the other fields.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

__all__ = ["Llama3RotaryEmbedding"]


class Llama3RotaryEmbedding(RotaryEmbedding):
    """RoPE with frequencies scaled as in Transformers 5.12.1.

    The formula is `transformers.modeling_rope_utils._compute_llama3_parameters`.

    Args:
        factor: divides the frequencies whose wavelength exceeds
            original_max_positions / low_freq_factor.
        low_freq_factor, high_freq_factor: scaled and unscaled frequencies are blended between the
            wavelengths original_max_positions / low_freq_factor and / high_freq_factor.
        original_max_positions: tokens, before the context was extended.
        kwargs: `RotaryEmbedding`'s own.
    """

    def __init__(
        self,
        *,
        factor: float,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_positions: int,
        **kwargs: object,
    ) -> None:
        super().__init__(rope_scaling=False, **kwargs)
        self.inv_freq: torch.Tensor = self._apply_scaling(
            self.inv_freq,
            factor=factor,
            low_freq_factor=low_freq_factor,
            high_freq_factor=high_freq_factor,
            original_max_position_embeddings=original_max_positions,
        )
