"""Self-attention that rotates queries and keys in fp32.

Megatron-Core's unfused RoPE rounds cos and sin to the activations' type first (`rope_utils.py`,
`_apply_rotary_pos_emb_bshd`); Transformer Engine's fused kernel computes in fp32, as ERNIE's reference does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention

__all__ = ["Fp32RotarySelfAttention"]


class Fp32RotarySelfAttention(SelfAttention):
    """SelfAttention whose training and evaluation path rotates in fp32 and casts back; inference is the parent's."""

    _rotation: Any = None  # angles and packing of the forward pass under way

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the parent's; the angles are kept from it, and applied where queries and keys come into being."""
        angles = kwargs.get("rotary_pos_emb")
        cached = (
            kwargs.get("inference_context") is not None
            or kwargs.get("inference_params") is not None
        )
        if angles is None or cached or self.config.apply_rope_fusion:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._rotation = (
            angles if isinstance(angles, tuple) else (angles, angles),
            kwargs.get("packed_seq_params"),
        )
        try:
            return super().forward(
                hidden_states, attention_mask, *args, **kwargs | {"rotary_pos_emb": None}
            )
        finally:
            self._rotation = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Query [S, B, N, D], key and value [S, B, G, D], the first two rotated."""
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self._rotation is not None:
            angles, packed = self._rotation
            query = self._rotated(query, angles[0], packed, "q")
            key = self._rotated(key, angles[1], packed, "kv")
        return query, key, *rest

    def _rotated(
        self, tensor: torch.Tensor, angles: torch.Tensor, packed: Any, which: str
    ) -> torch.Tensor:
        starts = None
        if packed is not None and packed.qkv_format == "thd":
            padded = getattr(packed, f"cu_seqlens_{which}_padded")
            starts = getattr(packed, f"cu_seqlens_{which}") if padded is None else padded
            return apply_rotary_pos_emb(
                tensor.squeeze(1).float(),
                angles,
                config=self.config,
                cu_seqlens=starts,
                cp_group=self.pg_collection.cp,
            ).type_as(tensor)[:, None]
        rotated = apply_rotary_pos_emb(
            tensor.float(), angles, config=self.config, cp_group=self.pg_collection.cp
        )
        return rotated.type_as(tensor)
