"""Self-attention with one kernel for the split of q, k and v, QK norm and RoPE.

The kernel is `modules/kernels/qk_norm_rope.py`.

Axes: S sequence, B batch, H hidden, N query heads of this rank, G KV heads of this rank, D head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.transformer.identity_op import IdentityOp

from exaone_bridge.modules.kernels.qk_norm_rope import qk_norm_rope
from exaone_bridge.modules.norm import FusedRMSNorm
from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention
from exaone_bridge.schema.json_types import JSONMapping

__all__ = ["FusedSelfAttention"]

# Arguments of inference and of packed sequences, which the kernel does not support.
_UNSUPPORTED_ARGUMENTS = (
    "inference_context",
    "inference_params",
    "packed_seq_params",
    "rotary_pos_cos",
    "rotary_pos_sin",
)


@dataclass(frozen=True, slots=True)
class _KernelInputs:
    """Marks a forward pass that uses the kernel.

    Attributes:
        angles: [S, 1, 1, D] in radians; None: the layer has no RoPE.
    """

    angles: torch.Tensor | None


class FusedSelfAttention(Fp32RotarySelfAttention):
    """SelfAttention with the fused kernel, with or without QK norm, for training on a GPU.

    The parent classes handle what the kernel does not support: inference, packed sequences, more TP
    ranks than KV heads, and RoPE of a part of the head or without `apply_rope_fusion`.
    """

    _kernel_inputs: _KernelInputs | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute self-attention; see `Fp32RotarySelfAttention.forward`.

        Args:
            hidden_states: [S, B, H] ([S / tp, B, H] with sequence parallelism).
            attention_mask: passed to core attention.
            args, kwargs: of `SelfAttention.forward`.

        Returns:
            The output in the shape of `hidden_states`, and the bias [H] if it is not added yet.
        """
        angles = self._layer_angles(kwargs)
        if args or not self._kernel_supports(hidden_states, angles, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        self._kernel_inputs = _KernelInputs(angles[0] if isinstance(angles, tuple) else angles)
        try:
            return super().forward(
                hidden_states, attention_mask, **kwargs | {"rotary_pos_emb": None}
            )
        finally:
            self._kernel_inputs = None

    def get_query_key_value_tensors(
        self, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, ...]:
        """Project hidden states to queries, keys and values.

        Returns:
            Query [S, B, N, D] and key [S, B, G, D], normalised and with RoPE applied, and value
            [S, B, G, D].
        """
        if self._kernel_inputs is None:
            return super().get_query_key_value_tensors(*args, **kwargs)
        qkv, _ = super().get_query_key_value_tensors(*args, **kwargs | {"split_qkv": False})
        angles = self._kernel_inputs.angles
        if angles is not None:
            angles = angles[: qkv.shape[0]]
        weights, eps = None, 0.0
        if self._has_qk_norm():
            for norm in (self.q_layernorm, self.k_layernorm):
                for hook in norm._forward_pre_hooks.values():
                    hook(norm, ())  # with overlap_param_gather: wait for the norm's weight
            weights = (self.q_layernorm.weight, self.k_layernorm.weight)
            eps = self.q_layernorm.eps
        head_dim, interleaved = self.hidden_size_per_attention_head, self.config.rotary_interleaved
        return qk_norm_rope(qkv, head_dim, weights, eps, angles, interleaved)

    def _has_qk_norm(self) -> bool:
        norms = (self.q_layernorm, self.k_layernorm)
        return all(isinstance(norm, FusedRMSNorm) for norm in norms)

    def _kernel_supports(
        self,
        hidden_states: torch.Tensor,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
        arguments: JSONMapping,
    ) -> bool:
        config, head_dim = self.config, self.hidden_size_per_attention_head
        if any(arguments.get(name) is not None for name in _UNSUPPORTED_ARGUMENTS):
            return False
        if not hidden_states.is_cuda or config.test_mode:
            return False
        if config.num_query_groups < self.world_size or config.attention_output_gate:
            return False
        if head_dim < 32 or head_dim & (head_dim - 1):
            return False
        has_no_norm = all(
            norm is None or isinstance(norm, IdentityOp)
            for norm in (self.q_layernorm, self.k_layernorm)
        )
        if not (has_no_norm or self._has_qk_norm()):
            return False
        pair = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
        if pair[0] is not pair[1]:  # queries and keys have different angles
            return False
        angles = pair[0]
        if angles is None:
            return not has_no_norm  # otherwise the split is all there is to do
        return bool(
            config.apply_rope_fusion
            and angles.shape[-1] == head_dim
            and angles.numel() == angles.shape[0] * head_dim
        )
