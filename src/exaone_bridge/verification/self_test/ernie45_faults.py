"""Faults of ERNIE 4.5: the miniature of the 21B, a dense layer and three with eight experts, two of them shared."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.self_test.fault import Fault, mappings_changed, patched

__all__ = ["ERNIE45_FAULTS"]

MODEL = "ernie45"

Routed = tuple[torch.Tensor, torch.Tensor]


def _sigmoid(logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float) -> Routed:
    scores = logits.sigmoid()
    experts = (scores + bias).topk(topk).indices
    chosen = scores.gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _biased(logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float) -> Routed:
    chosen, experts = (logits.softmax(-1) + bias).topk(topk)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _unnormalised(logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float) -> Routed:
    scores = logits.softmax(-1)
    experts = (scores + bias).topk(topk).indices
    return scores.gather(-1, experts), experts


def _unbiased(logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float) -> Routed:
    chosen, experts = logits.softmax(-1).topk(topk)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _layer(model: Any, number: int) -> Any:
    return model[0].decoder.layers[number]


def _swap_experts(model: Any) -> None:
    first, second, *_ = _layer(model, 2).mlp.experts.local_experts
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def _other_layers_router(model: Any) -> None:
    _layer(model, 3).mlp.router.weight.copy_(_layer(model, 2).mlp.router.weight)


def _rounded_router(model: Any) -> None:
    for number in (1, 2, 3):
        weight = _layer(model, number).mlp.router.weight
        weight.copy_(weight.bfloat16())


def _lose_bias(model: Any) -> None:
    _layer(model, 2).mlp.router.expert_bias.zero_()


def _reset_norm(model: Any) -> None:
    _layer(model, 2).self_attention.linear_qkv.layer_norm_weight.fill_(1)


def _reset_second_norm(model: Any) -> None:
    _layer(model, 1).pre_mlp_layernorm.weight.fill_(1)


def _drop_shared() -> Any:
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    return patched(
        f"{SharedExpertMLP.__module__}.SharedExpertMLP.forward", lambda self, x: torch.zeros_like(x)
    )()


def _double_shared() -> Any:
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    right = SharedExpertMLP.forward
    return patched(
        f"{SharedExpertMLP.__module__}.SharedExpertMLP.forward", lambda self, x: 2 * right(self, x)
    )()


def _rounded_angles() -> Any:
    """Angles of queries and keys rounded to bf16, as a model that casts cos and sin would have them."""
    from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

    right = Fp32RotarySelfAttention._rotated

    def rotated(
        self: Any, tensor: torch.Tensor, angles: torch.Tensor, packed: Any, which: str
    ) -> torch.Tensor:
        return right(self, tensor, angles.bfloat16().float(), packed, which)

    return patched(
        "exaone_bridge.modules.rotary_attention.Fp32RotarySelfAttention._rotated", rotated
    )()


def _swap_gate_and_up(mapping: ParamMapping) -> ParamMapping:
    return (
        dataclasses.replace(mapping, hf=mapping.hf[::-1])
        if "experts.linear_fc1" in mapping.megatron
        else mapping
    )


def _router(name: str, arithmetic: Any) -> Fault:
    context = patched("exaone_bridge.models.ernie45.router.choose_experts", arithmetic)
    return Fault(name=name, model=MODEL, caught=("logits",), begins=(1, "router"), code=context)


def _code(name: str, context: Any, layer: int, sublayer: str) -> Fault:
    return Fault(name=name, model=MODEL, caught=("logits",), begins=(layer, sublayer), code=context)


def _weights(name: str, change: Any, layer: int, sublayer: str) -> Fault:
    return Fault(
        name=name,
        model=MODEL,
        caught=("tensors", "logits"),
        begins=(layer, sublayer),
        weights=change,
    )


def _provider(
    name: str, layer: int, sublayer: str, *, exported: bool = True, **fields: Any
) -> Fault:
    caught = ("config", "logits") if exported else ("logits",)
    return Fault(name=name, model=MODEL, caught=caught, begins=(layer, sublayer), provider=fields)


ERNIE45_FAULTS: tuple[Fault, ...] = (
    _router("sigmoid router", _sigmoid),
    _router("selection bias in the weights", _biased),
    _router("weights not divided by their sum", _unnormalised),
    _router("selection bias ignored", _unbiased),
    _weights("two experts swapped", _swap_experts, 2, "mlp"),
    _weights("a router from another layer", _other_layers_router, 3, "router"),
    _weights("routers rounded to bf16", _rounded_router, 1, "router"),
    _weights("selection bias lost", _lose_bias, 2, "router"),
    _weights("an input norm left at one", _reset_norm, 2, "norm"),
    _weights("the norm before the experts left at one", _reset_second_norm, 1, "norm"),
    _code("shared experts dropped", _drop_shared, 1, "mlp"),
    _code("shared experts counted twice", _double_shared, 1, "mlp"),
    _code("angles rounded to bf16", _rounded_angles, 0, "attention"),
    _code(
        "gate and up of the experts swapped in the table",
        mappings_changed(ERNIE45, _swap_gate_and_up),
        1,
        "mlp",
    ),
    _provider("half-rotated RoPE", 0, "attention", exported=False, rotary_interleaved=False),
    _provider("theta 1e4 for 2e4", 0, "attention", rotary_base=10000.0),
    _provider("epsilon 1e-5 for 3e-4", 0, "norm", layernorm_epsilon=1e-5),
    _provider("two experts a token, not three", 1, "router", moe_router_topk=2),
    _provider("GELU for SiLU", 0, "mlp", exported=False, activation_func=torch.nn.functional.gelu),
)
