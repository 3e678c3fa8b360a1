"""Self-attention whose queries and keys are split, normalised and rotated by one kernel (`modules/kernels/qk_norm_rope.py`)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp

from exaone_bridge.modules.kernels.qk_norm_rope import qk_norm_rope
from exaone_bridge.modules.norm import FusedRMSNorm
from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

__all__ = ["FusedSelfAttention"]


class FusedSelfAttention(Fp32RotarySelfAttention):
    """SelfAttention with or without QK norm, for training and evaluation on a GPU.

    What the kernel cannot do is the parents' work: inference with a cache, packed documents, more tensor-parallel ranks
    than key-value heads, and RoPE of part of a head or without `apply_rope_fusion`.
    """

    _by_kernel: tuple[torch.Tensor | None] | None = (
        None  # the angles of a forward pass that the kernel rotates
    )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As the parent's; the angles are kept from it, and applied where queries and keys come into being."""
        angles = kwargs.get("rotary_pos_emb")
        if self.config.no_rope_freq and self.config.no_rope_freq[self.layer_number - 1]:
            angles = None
        if args or not self._fits(hidden_states, angles, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._by_kernel = (angles[0] if isinstance(angles, tuple) else angles,)
        try:
            return super().forward(
                hidden_states, attention_mask, **kwargs | {"rotary_pos_emb": None}
            )
        finally:
            self._by_kernel = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Query [S, B, N, D], key and value [S, B, G, D], the first two normalised and rotated."""
        if self._by_kernel is None:
            return super().get_query_key_value_tensors(*args, **kwargs)
        mixed, _ = super().get_query_key_value_tensors(*args, **kwargs | {"split_qkv": False})
        (angles,) = self._by_kernel
        if angles is not None:
            angles = angles[: mixed.shape[0]]
        weights, eps = None, 0.0
        if self._normed():
            norms: tuple[Any, Any] = self.q_layernorm, self.k_layernorm
            for norm in norms:
                for hook in norm._forward_pre_hooks.values():
                    hook(norm, ())  # overlap_param_gather waits there for the norm's weight
            weights, eps = (norms[0].weight, norms[1].weight), norms[0].eps
        size, pairs = self.hidden_size_per_attention_head, self.config.rotary_interleaved
        return qk_norm_rope(mixed, size, weights, eps, angles, pairs)

    def _normed(self) -> bool:
        return isinstance(self.q_layernorm, FusedRMSNorm) and isinstance(
            self.k_layernorm, FusedRMSNorm
        )

    def _fits(self, hidden: torch.Tensor, angles: Any, options: dict[str, Any]) -> bool:
        config, size = self.config, self.hidden_size_per_attention_head
        elsewhere = (
            "inference_context",
            "inference_params",
            "packed_seq_params",
            "rotary_pos_cos",
            "rotary_pos_sin",
        )
        if (
            any(options.get(name) is not None for name in elsewhere)
            or not hidden.is_cuda
            or config.test_mode
        ):
            return False
        if (
            config.num_query_groups < self.world_size
            or config.attention_output_gate
            or size < 32
            or size & (size - 1)
        ):
            return False
        bare = all(
            norm is None or isinstance(norm, IdentityOp)
            for norm in (self.q_layernorm, self.k_layernorm)
        )
        if not (bare or self._normed()) or (
            isinstance(angles, tuple) and angles[0] is not angles[1]
        ):
            return False
        angles = angles[0] if isinstance(angles, tuple) else angles
        if angles is None:
            return not bare  # else there is nothing to do
        return (
            config.apply_rope_fusion
            and angles.shape[-1] == size
            and angles.numel() == angles.shape[0] * size
        )
