"""Patches of code that several families' faults use."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from unittest import mock

import torch

from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.self_test.fault import Chunks, MappingChange, Patch

__all__ = [
    "move_norms_to_outputs",
    "reordered_tensors",
    "scaled_shared_experts",
    "softmax_scale_of",
]


def scaled_shared_experts(scale: float) -> Patch:
    """Make a patch that multiplies the output of the shared experts."""

    def patch() -> contextlib.AbstractContextManager[object]:
        from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

        original = SharedExpertMLP.forward

        def forward(self: SharedExpertMLP, hidden_states: torch.Tensor) -> torch.Tensor:
            return scale * original(self, hidden_states)

        return mock.patch.object(SharedExpertMLP, "forward", forward)

    return patch


def softmax_scale_of(head_dim: int) -> Patch:
    """Make a patch that scales attention scores as those of another head dimension."""

    def patch() -> contextlib.AbstractContextManager[object]:
        from exaone_bridge.modules.attention import TorchDotProductAttention

        original = TorchDotProductAttention._attend

        def attend(
            self: TorchDotProductAttention,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
        ) -> torch.Tensor:
            self.softmax_scale = head_dim**-0.5
            return original(self, query, key, value)

        return mock.patch.object(TorchDotProductAttention, "_attend", attend)

    return patch


def move_norms_to_outputs(model: Chunks) -> None:
    """Let each norm before a sublayer normalise its output instead, as in EXAONE 4.0."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    def normalise_output(sublayer: torch.nn.Module, weight: torch.Tensor, eps: float) -> None:
        sublayer.register_forward_hook(
            lambda _, __, output: (
                torch.nn.functional.rms_norm(output[0], weight.shape, weight, eps),
                *output[1:],
            )
        )

    for layer in model[0].decoder.layers:
        eps = layer.config.layernorm_epsilon
        for sublayer, linear in ((layer.self_attention, "linear_qkv"), (layer.mlp, "linear_fc1")):
            if (fused := getattr(sublayer, linear, None)) is not None:
                fused.forward = functools.partial(ColumnParallelLinear.forward, fused)
                normalise_output(sublayer, fused.layer_norm_weight, eps)
            else:
                layer.pre_mlp_layernorm.forward = lambda hidden: hidden
                normalise_output(sublayer, layer.pre_mlp_layernorm.weight, eps)


def reordered_tensors(megatron: str, *order: int) -> MappingChange:
    """Reorder the Hugging Face tensors of the mappings whose Megatron-Core name contains a text."""

    def change(mapping: ParamMapping) -> ParamMapping:
        if megatron not in mapping.megatron:
            return mapping
        return dataclasses.replace(mapping, hf=tuple(mapping.hf[number] for number in order))

    return change
