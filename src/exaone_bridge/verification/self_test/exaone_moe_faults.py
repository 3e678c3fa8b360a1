"""Faults of EXAONE MoE (K-EXAONE).

The tiny model has the structure of the 236B: sliding-window attention (5 tokens) in three layers,
full attention in the fourth; a dense MLP in the first, then eight experts and a shared one.
Transformers runs neither multi-token prediction nor what K-EXAONE 2.0 adds; their faults are in
`tests/parity/exaone_moe/test_reference.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from exaone_bridge.models.exaone_moe import EXAONE_MOE
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.self_test.fault import (
    Chunks,
    CodeFault,
    Fault,
    FaultSite,
    MappingChange,
    ModelChange,
    Patch,
    ProviderFault,
    WeightFault,
    changed_mappings,
    changed_model,
    swap,
)
from exaone_bridge.verification.self_test.patches import (
    move_norms_to_outputs,
    reordered_tensors,
    scaled_shared_experts,
    softmax_scale_of,
)

__all__ = ["EXAONE_MOE_FAULTS"]

MODEL = "exaone-moe"
TOPK, SCALE = 3, 2.5
HIDDEN_SIZE, HEADS = 64, 4

SLIDING, NOPE = [1, 1, 1, 0], [0, 0, 0, 1]  # per layer, as in the provider

Choose = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logits [T, E], selection bias [E]) -> weights [T, K] and experts [T, K]."""


# --- weights --------------------------------------------------------------------------------------


def _layer(model: Chunks, number: int) -> torch.nn.Module:
    return model[0].decoder.layers[number]


def _swap_experts(model: Chunks) -> None:
    first, second, *_ = _layer(model, 2).mlp.experts.local_experts
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        swap(a, b)


def _copy_router(model: Chunks) -> None:
    _layer(model, 3).mlp.router.weight.copy_(_layer(model, 2).mlp.router.weight)


def _copy_selection_bias(model: Chunks) -> None:
    _layer(model, 3).mlp.router.expert_bias.copy_(_layer(model, 2).mlp.router.expert_bias)


def _zero_selection_bias(model: Chunks) -> None:
    _layer(model, 2).mlp.router.expert_bias.zero_()


def _round_routers(model: Chunks) -> None:
    for number in (1, 2, 3):
        weight = _layer(model, number).mlp.router.weight
        weight.copy_(weight.bfloat16())


def _swap_norms(model: Chunks) -> None:
    layer = _layer(model, 2)
    swap(layer.self_attention.linear_qkv.layer_norm_weight, layer.pre_mlp_layernorm.weight)


def _swap_query_and_key_norms(model: Chunks) -> None:
    attention = _layer(model, 1).self_attention
    swap(attention.q_layernorm.weight, attention.k_layernorm.weight)


def _swap_gate_and_up(model: Chunks) -> None:
    swap(*_layer(model, 0).mlp.linear_fc1.weight.chunk(2))


# --- code -----------------------------------------------------------------------------------------


def _weights_of(scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    chosen = scores.gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True) * SCALE


def _softmax(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.softmax(-1)
    experts = (scores + bias).topk(TOPK).indices
    return _weights_of(scores, experts), experts


def _biased_weights(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid() + bias
    experts = scores.topk(TOPK).indices
    return _weights_of(scores, experts), experts


def _unbiased_selection(
    logits: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    experts = scores.topk(TOPK).indices
    return _weights_of(scores, experts), experts


def _scaled_twice(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    experts = (scores + bias).topk(TOPK).indices
    return _weights_of(scores, experts) * SCALE, experts


def _scaled_before_the_sum(
    logits: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid() * SCALE
    experts = (logits.sigmoid() + bias).topk(TOPK).indices
    return _weights_of(scores, experts) / SCALE, experts


def _large_epsilon(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    experts = (scores + bias).topk(TOPK).indices
    chosen = scores.gather(-1, experts)
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-3) * SCALE, experts


def _bf16_gating() -> contextlib.AbstractContextManager[object]:
    """Multiply in bf16, as a router does that stays in the model's dtype."""
    from exaone_bridge.models.exaone_moe.router import ExaoneMoeRouter

    def gating(self: ExaoneMoeRouter, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.bfloat16(), self.weight.bfloat16()).float()

    return mock.patch.object(ExaoneMoeRouter, "gating", gating)


def _skip_query_and_key_norms(model: Chunks) -> None:
    for layer in model[0].decoder.layers:
        for norm in (layer.self_attention.q_layernorm, layer.self_attention.k_layernorm):
            norm.forward = lambda heads: heads


def _normalise_after_rope(model: Chunks) -> None:
    for layer in model[0].decoder.layers:
        attention = layer.self_attention
        norms = attention.q_layernorm.forward, attention.k_layernorm.forward
        attention.q_layernorm.forward = attention.k_layernorm.forward = lambda heads: heads
        core = attention.core_attention

        def forward(
            query: torch.Tensor,
            key: torch.Tensor,
            *args: Any,
            norms: Any = norms,
            original: Any = core.forward,
            **kwargs: Any,
        ) -> torch.Tensor:
            output: torch.Tensor = original(norms[0](query), norms[1](key), *args, **kwargs)
            return output

        core.forward = forward


def _swap_norm_names(mapping: ParamMapping) -> ParamMapping:
    names = ("input_layernorm", "post_attention_layernorm")
    tensor = mapping.hf[0]
    for this, other in (names, names[::-1]):
        if this in tensor.name:
            renamed = dataclasses.replace(tensor, name=tensor.name.replace(this, other))
            return dataclasses.replace(mapping, hf=(renamed,))
    return mapping


def _exported_config(**fields: object) -> Patch:
    """Make a patch that changes fields of the exported config.json; `...` removes one."""

    def patch() -> contextlib.AbstractContextManager[object]:
        from exaone_bridge.bridge.exact_bridge import ExactBridge

        original = ExactBridge.config_json_of.__func__  # type: ignore[attr-defined]

        def write(cls: type[ExactBridge], *args: Any) -> dict[str, Any]:
            written = original(cls, *args) | fields
            return {name: value for name, value in written.items() if value is not ...}

        return mock.patch.object(ExactBridge, "config_json_of", classmethod(write))

    return patch


# --- the list -------------------------------------------------------------------------------------


def _weights(name: str, change: ModelChange, layer: int, sublayer: str) -> Fault:
    return WeightFault(
        name=name,
        model=MODEL,
        failing=("tensors", "logits"),
        site=FaultSite(sublayer, layer),
        change=change,
    )


def _provider(
    name: str, layer: int, sublayer: str, *, rejected: bool = False, **fields: object
) -> Fault:
    """Return a fault that the exported config.json shows, or that it cannot express."""
    return ProviderFault(
        name=name,
        model=MODEL,
        failing=("rejected" if rejected else "config", "logits"),
        site=FaultSite(sublayer, layer),
        fields=fields,
    )


def _code(name: str, patch: Patch, layer: int, sublayer: str) -> Fault:
    return CodeFault(
        name=name, model=MODEL, failing=("logits",), site=FaultSite(sublayer, layer), patch=patch
    )


def _mapping(name: str, change: MappingChange, layer: int, sublayer: str) -> Fault:
    return _code(name, lambda: changed_mappings(EXAONE_MOE, change), layer, sublayer)


def _router(name: str, choose: Choose) -> Fault:
    def patch() -> contextlib.AbstractContextManager[object]:
        from exaone_bridge.models.exaone_moe.router import ExaoneMoeRouter

        return mock.patch.object(
            ExaoneMoeRouter, "choose", lambda self, logits: choose(logits, self.expert_bias)
        )

    return _code(name, patch, 1, "router")


def _config(name: str, *, rejected: bool = False, **fields: object) -> Fault:
    """Return a fault of the exported config.json, which a save rejects if it makes no model."""
    failing = ("rejected" if rejected else "config",)
    return CodeFault(name=name, model=MODEL, failing=failing, patch=_exported_config(**fields))


def _flip(values: list[int], layer: int) -> list[int]:
    return [*values[:layer], 1 - values[layer], *values[layer + 1 :]]


EXAONE_MOE_FAULTS: tuple[Fault, ...] = (
    _router("softmax instead of sigmoid in the router", _softmax),
    _router("selection bias in the weights", _biased_weights),
    _router("selection bias ignored", _unbiased_selection),
    _router("scaling factor applied twice", _scaled_twice),
    _router("scaling factor divided away with the sum", _scaled_before_the_sum),
    _router("1e-3 added to the sum of the weights", _large_epsilon),
    _code("gate multiplied in bf16", _bf16_gating, 1, "router"),
    _code("shared expert dropped", scaled_shared_experts(0), 1, "mlp"),
    _code("shared expert scaled like the routed ones", scaled_shared_experts(SCALE), 1, "mlp"),
    _code(
        "norms after the sublayers instead of before",
        lambda: changed_model(move_norms_to_outputs),
        0,
        "attention",
    ),
    _code(
        "query and key norms left out",
        lambda: changed_model(_skip_query_and_key_norms),
        0,
        "norm",
    ),
    _code(
        "query and key norms after RoPE",
        lambda: changed_model(_normalise_after_rope),
        0,
        "norm",
    ),
    _code(
        "softmax scale of another head size",
        softmax_scale_of(HIDDEN_SIZE // HEADS),
        0,
        "attention",
    ),
    _mapping("norms of a layer swapped in the mapping", _swap_norm_names, 0, "norm"),
    _mapping(
        "gate and up of the experts swapped in the mapping",
        reordered_tensors("experts.linear_fc1.weight*", 1, 0),
        1,
        "mlp",
    ),
    _mapping(
        "gate and up of the shared expert swapped in the mapping",
        reordered_tensors("shared_experts.linear_fc1", 1, 0),
        1,
        "mlp",
    ),
    _config("config exported without layer_types", rejected=True, layer_types=...),
    _config("config exported with a window of 4096", rejected=True, sliding_window=4096),
    _config("config exported without norm_topk_prob", norm_topk_prob=...),
    _config("config exported without mlp_layer_types", mlp_layer_types=...),
    _weights("two experts swapped", _swap_experts, 2, "mlp"),
    _weights("the router of another layer", _copy_router, 3, "router"),
    _weights("selection bias of another layer", _copy_selection_bias, 3, "router"),
    _weights("selection bias lost", _zero_selection_bias, 2, "router"),
    _weights("routers rounded to bf16", _round_routers, 1, "router"),
    _weights("norms of a layer swapped", _swap_norms, 2, "norm"),
    _weights("query and key norms of a layer swapped", _swap_query_and_key_norms, 1, "norm"),
    _weights("gate and up of the dense layer swapped", _swap_gate_and_up, 0, "mlp"),
    _provider("weights not divided by their sum", 1, "router", norm_topk_prob=False),
    _provider("scaling factor 1", 1, "router", moe_router_topk_scaling_factor=1.0),
    _provider("top-2 experts instead of top-3", 1, "router", moe_router_topk=2),
    _provider("window off by one", 0, "attention", window_size=(5, 0)),
    _provider(
        "layer 2 of the full-attention type",
        2,
        "attention",
        window_attn_skip_freq=_flip(SLIDING, 2),
        no_rope_freq=_flip(NOPE, 2),
    ),
    _provider(
        "layer 3 of the sliding-window type",
        3,
        "attention",
        window_attn_skip_freq=_flip(SLIDING, 3),
        no_rope_freq=_flip(NOPE, 3),
    ),
    _provider(
        "RoPE in full-attention layer 3",
        3,
        "attention",
        rejected=True,
        no_rope_freq=_flip(NOPE, 3),
    ),
    _provider(
        "no RoPE in sliding-window layer 1",
        1,
        "attention",
        rejected=True,
        no_rope_freq=_flip(NOPE, 1),
    ),
    _provider(
        "sliding window without RoPE in layer 3",
        3,
        "attention",
        rejected=True,
        window_attn_skip_freq=_flip(SLIDING, 3),
    ),
    _provider("RoPE theta 1e4 instead of 2e4", 0, "attention", rotary_base=10000.0),
    _provider("epsilon 1e-5 instead of 3e-4", 0, "norm", layernorm_epsilon=1e-5),
    ProviderFault(
        name="dense layer 0 read as sparse",
        model=MODEL,
        failing=("rejected",),
        fields={"moe_layer_freq": [1, 1, 1, 1]},
    ),
)
