"""Faults of ERNIE 4.5.

The tiny model has the structure of the 21B: one dense layer, then three layers with eight experts,
two of them shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.verification.self_test.fault import (
    Chunks,
    CodeFault,
    Fault,
    FaultSite,
    ModelChange,
    Patch,
    ProviderFault,
    WeightFault,
    changed_mappings,
    swap,
)
from exaone_bridge.verification.self_test.patches import (
    reordered_tensors,
    scaled_shared_experts,
)

__all__ = ["ERNIE45_FAULTS"]

MODEL = "ernie45"

Routing = tuple[torch.Tensor, torch.Tensor]
"""Probabilities [T, topk] and numbers [T, topk] of the chosen experts."""
Choose = Callable[[torch.Tensor, torch.Tensor, int, float], Routing]
"""(logits [T, E], selection bias [E], topk, smallest norm) -> routing."""


# --- weights --------------------------------------------------------------------------------------


def _layer(model: Chunks, number: int) -> torch.nn.Module:
    return model[0].decoder.layers[number]


def _swap_experts(model: Chunks) -> None:
    first, second, *_ = _layer(model, 2).mlp.experts.local_experts
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        swap(a, b)


def _copy_router(model: Chunks) -> None:
    _layer(model, 3).mlp.router.weight.copy_(_layer(model, 2).mlp.router.weight)


def _round_routers(model: Chunks) -> None:
    for number in (1, 2, 3):
        weight = _layer(model, number).mlp.router.weight
        weight.copy_(weight.bfloat16())


def _zero_selection_bias(model: Chunks) -> None:
    _layer(model, 2).mlp.router.expert_bias.zero_()


def _reset_input_norm(model: Chunks) -> None:
    _layer(model, 2).self_attention.linear_qkv.layer_norm_weight.fill_(1)


def _reset_mlp_norm(model: Chunks) -> None:
    _layer(model, 1).pre_mlp_layernorm.weight.fill_(1)


# --- code -----------------------------------------------------------------------------------------


def _sigmoid(logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float) -> Routing:
    scores = logits.sigmoid()
    experts = (scores + bias).topk(topk).indices
    chosen = scores.gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _biased_probabilities(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float
) -> Routing:
    chosen, experts = (logits.softmax(-1) + bias).topk(topk)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _unnormalised(logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float) -> Routing:
    scores = logits.softmax(-1)
    experts = (scores + bias).topk(topk).indices
    return scores.gather(-1, experts), experts


def _unbiased_selection(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float
) -> Routing:
    chosen, experts = logits.softmax(-1).topk(topk)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _round_angles() -> contextlib.AbstractContextManager[object]:
    """Round the angles of RoPE to bf16, as a model does whose cos and sin are cast."""
    from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

    original = Fp32RotarySelfAttention._apply_rope

    def rotate(
        self: Fp32RotarySelfAttention, tensor: torch.Tensor, angles: torch.Tensor, *args: Any
    ) -> torch.Tensor:
        return original(self, tensor, angles.bfloat16().float(), *args)

    return mock.patch.object(Fp32RotarySelfAttention, "_apply_rope", rotate)


# --- the list -------------------------------------------------------------------------------------


def _weights(name: str, change: ModelChange, layer: int, sublayer: str) -> Fault:
    return WeightFault(
        name=name,
        model=MODEL,
        failing=("tensors", "logits"),
        site=FaultSite(sublayer, layer),
        change=change,
    )


def _provider(name: str, layer: int, sublayer: str, *failing: str, **fields: object) -> Fault:
    """Return a fault that fails these checks besides the logits."""
    return ProviderFault(
        name=name,
        model=MODEL,
        failing=(*failing, "logits"),
        site=FaultSite(sublayer, layer),
        fields=fields,
    )


def _code(name: str, patch: Patch, layer: int, sublayer: str) -> Fault:
    return CodeFault(
        name=name, model=MODEL, failing=("logits",), site=FaultSite(sublayer, layer), patch=patch
    )


def _router(name: str, choose_experts: Choose) -> Fault:
    def patch() -> contextlib.AbstractContextManager[object]:
        from exaone_bridge.models.ernie45 import router

        return mock.patch.object(router, "choose_experts", choose_experts)

    return _code(name, patch, 1, "router")


ERNIE45_FAULTS: tuple[Fault, ...] = (
    _router("sigmoid instead of softmax in the router", _sigmoid),
    _router("selection bias in the probabilities", _biased_probabilities),
    _router("probabilities not divided by their sum", _unnormalised),
    _router("selection bias ignored", _unbiased_selection),
    _weights("two experts swapped", _swap_experts, 2, "mlp"),
    _weights("the router of another layer", _copy_router, 3, "router"),
    _weights("routers rounded to bf16", _round_routers, 1, "router"),
    _weights("selection bias lost", _zero_selection_bias, 2, "router"),
    _weights("an input norm left at one", _reset_input_norm, 2, "norm"),
    _weights("the norm before the experts left at one", _reset_mlp_norm, 1, "norm"),
    _code("shared experts dropped", scaled_shared_experts(0), 1, "mlp"),
    _code("shared experts counted twice", scaled_shared_experts(2), 1, "mlp"),
    _code("RoPE angles rounded to bf16", _round_angles, 0, "attention"),
    _code(
        "gate and up of the experts swapped in the mapping",
        lambda: changed_mappings(ERNIE45, reordered_tensors("experts.linear_fc1.weight*", 1, 0)),
        1,
        "mlp",
    ),
    _provider("half-rotated RoPE", 0, "attention", rotary_interleaved=False),
    _provider("RoPE theta 1e4 instead of 2e4", 0, "attention", "config", rotary_base=10000.0),
    _provider("epsilon 1e-5 instead of 3e-4", 0, "norm", "config", layernorm_epsilon=1e-5),
    _provider("top-2 experts instead of top-3", 1, "router", "config", moe_router_topk=2),
    _provider("GELU instead of SiLU", 0, "mlp", activation_func=torch.nn.functional.gelu),
)
