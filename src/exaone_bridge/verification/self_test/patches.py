"""Patches of code that several families' faults use."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import torch

from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.self_test.fault import MappingChange, Patch

__all__ = ["reordered_tensors", "scaled_shared_experts", "softmax_scale_of"]


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


def reordered_tensors(megatron: str, *order: int) -> MappingChange:
    """Reorder the Hugging Face tensors of the mappings whose Megatron-Core name contains a text."""

    def change(mapping: ParamMapping) -> ParamMapping:
        if megatron not in mapping.megatron:
            return mapping
        return dataclasses.replace(mapping, hf=tuple(mapping.hf[number] for number in order))

    return change
