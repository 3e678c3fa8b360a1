"""Self-attention that applies RoPE in fp32.

Megatron-Core 0.19.2's unfused RoPE rounds cos and sin to the activations' dtype first
(`models/common/embeddings/rope_utils.py`, `_apply_rotary_pos_emb_bshd`). Transformer Engine's fused
kernel computes in fp32, and so does the reference for ERNIE 4.5 (`apply_rotary_pos_emb` in
`modeling_ernie4_5.py`, Transformers 5.12.1).

Axes: S sequence, B batch, H hidden, N query heads of this rank, G KV heads of this rank, D head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention

from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["Fp32RotarySelfAttention"]


@dataclass(frozen=True, slots=True)
class _PendingRope:
    """The RoPE that the current forward pass has to apply.

    Attributes:
        query_angles, key_angles: [S, 1, 1, D] in radians.
        packed: the offsets of packed sequences.
    """

    query_angles: torch.Tensor
    key_angles: torch.Tensor
    packed: PackedSeqParams | None


class Fp32RotarySelfAttention(SelfAttention):
    """SelfAttention with fp32 RoPE in training and evaluation; inference is the parent's."""

    _pending_rope: _PendingRope | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute self-attention.

        The parent gets no angles: RoPE is applied in `get_query_key_value_tensors` instead.

        Args:
            hidden_states: [S, B, H] ([S / tp, B, H] with sequence parallelism).
            attention_mask: passed to core attention.
            args, kwargs: of `SelfAttention.forward`.

        Returns:
            The output in the shape of `hidden_states`, and the bias [H] if it is not added yet.
        """
        angles = self._layer_angles(kwargs)
        is_inference = any(
            kwargs.get(name) is not None for name in ("inference_context", "inference_params")
        )
        if angles is None or is_inference or self.config.apply_rope_fusion:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        query_angles, key_angles = angles if isinstance(angles, tuple) else (angles, angles)
        self._pending_rope = _PendingRope(query_angles, key_angles, kwargs.get("packed_seq_params"))
        try:
            return super().forward(
                hidden_states, attention_mask, *args, **kwargs | {"rotary_pos_emb": None}
            )
        finally:
            self._pending_rope = None

    def _layer_angles(self, arguments: JSONMapping) -> Any:
        """Return the `rotary_pos_emb` of `forward`'s arguments; None: the layer has no RoPE."""
        # As `SelfAttention.forward`, which has no angles to drop when `forward` gives it none.
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:
            return None
        return arguments.get("rotary_pos_emb")

    def get_query_key_value_tensors(
        self, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, ...]:
        """Project hidden states to queries, keys and values.

        Returns:
            Query [S, B, N, D] and key [S, B, G, D] with RoPE applied, value [S, B, G, D]; then
            what else the parent returns.
        """
        query, key, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if (rope := self._pending_rope) is not None:
            query = self._apply_rope(query, rope.query_angles, rope.packed, "q")
            key = self._apply_rope(key, rope.key_angles, rope.packed, "kv")
        return query, key, *rest

    def _apply_rope(
        self,
        tensor: torch.Tensor,
        angles: torch.Tensor,
        packed: PackedSeqParams | None,
        which: str,
    ) -> torch.Tensor:
        """Apply RoPE in fp32: [S, B, heads, D] -> the same shape and dtype.

        Args:
            tensor: queries or keys; B is 1 if they are packed.
            angles: [S, 1, 1, D] in radians.
            packed: the offsets of packed sequences.
            which: "q" or "kv", for the offsets in `packed`.
        """
        if packed is not None and packed.qkv_format == "thd":
            padded = getattr(packed, f"cu_seqlens_{which}_padded")
            offsets = getattr(packed, f"cu_seqlens_{which}") if padded is None else padded
            return apply_rotary_pos_emb(
                tensor.squeeze(1).float(),
                angles,
                config=self.config,
                cu_seqlens=offsets,
                cp_group=self.pg_collection.cp,
            ).type_as(tensor)[:, None]
        return apply_rotary_pos_emb(
            tensor.float(), angles, config=self.config, cp_group=self.pg_collection.cp
        ).type_as(tensor)
