"""Faults of EXAONE 4.0.

The tiny model has eight layers: three with sliding-window attention (8 tokens) and one with full
attention, twice. Token embeddings and output layer are not tied.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import torch

from exaone_bridge.models.exaone4 import EXAONE4
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
    swap,
)
from exaone_bridge.verification.self_test.patches import reordered_tensors, softmax_scale_of

__all__ = ["EXAONE4_FAULTS"]

MODEL = "exaone4"
HEAD_DIM, KV_HEADS, QUERIES_PER_KV_HEAD = 24, 2, 2

SLIDING, NOPE = [1, 1, 1, 0] * 2, [0, 0, 0, 1] * 2  # per layer, as in the provider


def _flip(values: list[int], layer: int) -> list[int]:
    return [*values[:layer], 1 - values[layer], *values[layer + 1 :]]


# --- weights --------------------------------------------------------------------------------------


def _layer(model: Chunks, number: int) -> torch.nn.Module:
    return model[0].decoder.layers[number]


def _qkv(model: Chunks, number: int) -> torch.Tensor:
    """Return the fused projection as a view [KV heads, queries of each + 2, D, H]."""
    weight = _layer(model, number).self_attention.linear_qkv.weight
    return weight.view(KV_HEADS, QUERIES_PER_KV_HEAD + 2, HEAD_DIM, -1)


def _swap_query_heads(model: Chunks) -> None:
    heads = _qkv(model, 2)
    swap(heads[0, 0], heads[0, 1])


def _swap_keys_and_values(model: Chunks) -> None:
    heads = _qkv(model, 5)
    swap(heads[:, -2], heads[:, -1])


def _concatenate_qkv(model: Chunks) -> None:
    heads = _qkv(model, 0)
    concatenated = torch.cat([heads[:, :-2].flatten(0, 1), heads[:, -2], heads[:, -1]])
    heads.copy_(concatenated.view_as(heads))


def _swap_gate_and_up(model: Chunks) -> None:
    gate, up = _layer(model, 1).mlp.linear_fc1.weight.chunk(2)
    swap(gate, up)


def _transpose_output_projection(model: Chunks) -> None:
    weight = _layer(model, 3).self_attention.linear_proj.weight
    weight.copy_(weight.t().reshape(weight.shape))


def _swap_layers(model: Chunks) -> None:
    for a, b in zip(_layer(model, 2).parameters(), _layer(model, 6).parameters(), strict=True):
        swap(a, b)


def _swap_post_norms(model: Chunks) -> None:
    layer = _layer(model, 4)
    swap(
        layer.self_attention.linear_proj.post_layernorm.weight,
        layer.mlp.linear_fc2.post_layernorm.weight,
    )


def _lose_half_of_down(model: Chunks) -> None:
    weight = _layer(model, 6).mlp.linear_fc2.weight
    weight[:, weight.shape[1] // 2 :] = 0


def _flip_one_bit(model: Chunks) -> None:
    _layer(model, 3).mlp.linear_fc2.weight.view(torch.int32)[5, 7] ^= 1


def _round_all(model: Chunks) -> None:
    for parameter in model[0].parameters():
        parameter.copy_(parameter.bfloat16())


def _reset_query_norm(model: Chunks) -> None:
    _layer(model, 0).self_attention.q_layernorm.weight.fill_(1)


def _shift_token_embeddings(model: Chunks) -> None:
    weight = model[0].embedding.word_embeddings.weight
    weight.copy_(weight.roll(1, 0))


def _swap_output_tokens(model: Chunks) -> None:
    weight = model[0].output_layer.weight
    swap(weight[100], weight[200])


def _scale_final_norm(model: Chunks) -> None:
    model[0].decoder.final_layernorm.weight.mul_(1.5)


# --- code -----------------------------------------------------------------------------------------


def _mappings(change: MappingChange) -> Patch:
    return lambda: changed_mappings(EXAONE4, change)


def _swap_post_norm_names(mapping: ParamMapping) -> ParamMapping:
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    tensor = mapping.hf[0]
    for this, other in (names, names[::-1]):
        if this in tensor.name:
            renamed = dataclasses.replace(tensor, name=tensor.name.replace(this, other))
            return dataclasses.replace(mapping, hf=(renamed,))
    return mapping


def _drop_down(mapping: ParamMapping) -> ParamMapping | None:
    return None if "down_proj" in mapping.hf[0].name else mapping


def _post_norm_epsilon() -> contextlib.AbstractContextManager[object]:
    """Use Megatron-Core's default epsilon in the post-norms, as Megatron-Bridge 0.6.2 does."""
    from exaone_bridge.modules import post_norm

    class DefaultEpsilonNorm(post_norm.TorchRMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
            super().__init__(config, hidden_size)

    return mock.patch.object(post_norm.RowParallelLinearLayerNorm, "norm", DefaultEpsilonNorm)


# --- the list -------------------------------------------------------------------------------------


def _weights(name: str, change: ModelChange, layer: int | None, sublayer: str | None) -> Fault:
    if sublayer is None:
        return WeightFault(name=name, model=MODEL, failing=("tensors",), change=change)
    return WeightFault(
        name=name,
        model=MODEL,
        failing=("tensors", "logits"),
        site=FaultSite(sublayer, layer),
        change=change,
    )


def _provider(name: str, layer: int, sublayer: str, **fields: object) -> Fault:
    """Return a fault that the exported config.json shows."""
    return ProviderFault(
        name=name,
        model=MODEL,
        failing=("config", "logits"),
        site=FaultSite(sublayer, layer),
        fields=fields,
    )


def _rejected(name: str, layer: int, **fields: object) -> Fault:
    """Return a fault in attention that config.json cannot express, so that the export raises."""
    return ProviderFault(
        name=name,
        model=MODEL,
        failing=("rejected", "logits"),
        site=FaultSite("attention", layer),
        fields=fields,
    )


def _code(name: str, patch: Patch, layer: int, sublayer: str) -> Fault:
    return CodeFault(
        name=name, model=MODEL, failing=("logits",), site=FaultSite(sublayer, layer), patch=patch
    )


EXAONE4_FAULTS: tuple[Fault, ...] = (
    _weights("two query heads swapped", _swap_query_heads, 2, "attention"),
    _weights("keys and values of a layer swapped", _swap_keys_and_values, 5, "attention"),
    _weights("q, k and v concatenated, not interleaved", _concatenate_qkv, 0, "attention"),
    _weights("gate and up of a layer swapped", _swap_gate_and_up, 1, "mlp"),
    _weights("output projection transposed", _transpose_output_projection, 3, "attention"),
    _weights("layers 2 and 6 swapped", _swap_layers, 2, "attention"),
    _weights("post-norms of a layer swapped", _swap_post_norms, 4, "norm"),
    _weights("half of a down projection lost", _lose_half_of_down, 6, "mlp"),
    _weights("one bit of one weight flipped", _flip_one_bit, None, None),
    _weights("every weight rounded to bf16", _round_all, None, "embedding"),
    _weights("a query norm left at one", _reset_query_norm, 0, "norm"),
    _weights("token embeddings shifted by one", _shift_token_embeddings, None, "embedding"),
    _weights("two tokens of the output layer swapped", _swap_output_tokens, None, "output layer"),
    _weights("final norm scaled", _scale_final_norm, None, "norm"),
    _provider("window off by one", 0, "attention", window_size=(8, 0)),
    _rejected("no window", 0, window_size=None, window_attn_skip_freq=None),
    _rejected("full attention with RoPE in layer 5", 5, window_attn_skip_freq=_flip(SLIDING, 5)),
    _rejected("sliding window without RoPE in layer 3", 3, window_attn_skip_freq=_flip(SLIDING, 3)),
    _rejected("NoPE inverted", 0, no_rope_freq=[1 - nope for nope in NOPE]),
    _rejected("RoPE in full-attention layer 7", 7, no_rope_freq=_flip(NOPE, 7)),
    _rejected("no RoPE in sliding-window layer 1", 1, no_rope_freq=_flip(NOPE, 1)),
    _rejected("RoPE in every layer", 3, no_rope_freq=[0] * 8),
    _provider(
        "layer 5 of the full-attention type",
        5,
        "attention",
        window_attn_skip_freq=_flip(SLIDING, 5),
        no_rope_freq=_flip(NOPE, 5),
    ),
    _provider(
        "layer 3 of the sliding-window type",
        3,
        "attention",
        window_attn_skip_freq=_flip(SLIDING, 3),
        no_rope_freq=_flip(NOPE, 3),
    ),
    _provider("RoPE factor 8 instead of 16", 0, "attention", rope_scaling_factor=8.0),
    _provider(
        "RoPE low frequency factor 2 instead of 1",
        0,
        "attention",
        rope_scaling_low_freq_factor=2.0,
    ),
    _provider(
        "RoPE high frequency factor 8 instead of 4",
        0,
        "attention",
        rope_scaling_high_freq_factor=8.0,
    ),
    _provider(
        "RoPE original length 8192 instead of 32",
        0,
        "attention",
        rope_scaling_original_max_position_embeddings=8192,
    ),
    _provider("RoPE not scaled", 0, "attention", rope_scaling=False),
    _provider("RoPE theta off by one percent", 0, "attention", rotary_base=10100.0),
    _provider("epsilon 1e-5 instead of 3e-4", 0, "norm", layernorm_epsilon=1e-5),
    ProviderFault(
        name="GELU instead of SiLU",
        model=MODEL,
        failing=("logits",),
        site=FaultSite("mlp", 0),
        fields={"activation_func": torch.nn.functional.gelu},
    ),
    ProviderFault(
        name="output layer tied",
        model=MODEL,
        failing=("rejected",),
        fields={"share_embeddings_and_output_weights": True},
    ),
    _code(
        "gate and up swapped in the mapping",
        _mappings(reordered_tensors("linear_fc1", 1, 0)),
        0,
        "mlp",
    ),
    _code(
        "keys and values swapped in the mapping",
        _mappings(reordered_tensors("linear_qkv.weight", 0, 2, 1)),
        0,
        "attention",
    ),
    _code("post-norms swapped in the mapping", _mappings(_swap_post_norm_names), 0, "norm"),
    _code("default epsilon in the post-norms", _post_norm_epsilon, 0, "norm"),
    _code("softmax scale of another head size", softmax_scale_of(64 // 4), 0, "attention"),
    CodeFault(
        name="a parameter mapping missing",
        model=MODEL,
        failing=("rejected",),
        patch=_mappings(_drop_down),
    ),
)
