"""Faults of EXAONE 4.0: the hybrid miniature, whose layers are LLLG LLLG, window 8, untied."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.self_test.fault import Fault, mappings_changed, patched, swap

__all__ = ["EXAONE4_FAULTS"]

MODEL = "exaone4"
BRIDGE = EXAONE4
D, GROUPS, PER_GROUP = 24, 2, 2  # head, key-value heads, query heads of each


def _layer(model: Any, number: int) -> Any:
    return model[0].decoder.layers[number]


def _qkv(model: Any, number: int) -> torch.Tensor:
    """[groups, queries + 2, D, H], a view."""
    return _layer(model, number).self_attention.linear_qkv.weight.view(GROUPS, PER_GROUP + 2, D, -1)


def _swap_heads(model: Any) -> None:
    heads = _qkv(model, 2)
    swap(heads[0, 0], heads[0, 1])


def _swap_key_value(model: Any) -> None:
    heads = _qkv(model, 5)
    swap(heads[:, -2], heads[:, -1])


def _not_interleaved(model: Any) -> None:
    heads = _qkv(model, 0)
    flat = torch.cat(
        [heads[:, :-2].flatten(0, 1), heads[:, -2], heads[:, -1]]
    )  # all queries, all keys, all values
    heads.copy_(flat.view_as(heads))


def _swap_gate_up(model: Any) -> None:
    gate, up = _layer(model, 1).mlp.linear_fc1.weight.chunk(2)
    swap(gate, up)


def _transpose(model: Any) -> None:
    weight = _layer(model, 3).self_attention.linear_proj.weight
    weight.copy_(weight.t().reshape(weight.shape))


def _swap_layers(model: Any) -> None:
    for a, b in zip(_layer(model, 2).parameters(), _layer(model, 6).parameters(), strict=True):
        swap(a, b)


def _swap_post_norms(model: Any) -> None:
    layer = _layer(model, 4)
    swap(
        layer.self_attention.linear_proj.post_layernorm.weight,
        layer.mlp.linear_fc2.post_layernorm.weight,
    )


def _lose_a_cut(model: Any) -> None:
    weight = _layer(model, 6).mlp.linear_fc2.weight
    weight[:, weight.shape[1] // 2 :] = 0


def _one_bit(model: Any) -> None:
    _layer(model, 3).mlp.linear_fc2.weight.view(torch.int32)[5, 7] ^= 1


def _round_all(model: Any) -> None:
    for parameter in model[0].parameters():
        parameter.copy_(parameter.bfloat16())


def _reset_q_norm(model: Any) -> None:
    _layer(model, 0).self_attention.q_layernorm.weight.fill_(1)


def _roll_words(model: Any) -> None:
    weight = model[0].embedding.word_embeddings.weight
    weight.copy_(weight.roll(1, 0))


def _swap_words_out(model: Any) -> None:
    weight = model[0].output_layer.weight
    swap(weight[100], weight[200])


def _double_final_norm(model: Any) -> None:
    model[0].decoder.final_layernorm.weight.mul_(1.5)


def _reorder(megatron: str, *order: int) -> Any:
    def change(mapping: ParamMapping) -> ParamMapping:
        if megatron not in mapping.megatron:
            return mapping
        return dataclasses.replace(mapping, hf=tuple(mapping.hf[number] for number in order))

    return mappings_changed(BRIDGE, change)


def _post_norms_in_the_table(mapping: ParamMapping) -> ParamMapping:
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    for this, other in (names, names[::-1]):
        if this in mapping.hf[0].name:
            tensor = dataclasses.replace(
                mapping.hf[0], name=mapping.hf[0].name.replace(this, other)
            )
            return dataclasses.replace(mapping, hf=(tensor,))
    return mapping


def _no_down(mapping: ParamMapping) -> ParamMapping | None:
    return None if "down_proj" in mapping.hf[0].name else mapping


def _post_norm_epsilon() -> Any:
    """Megatron-Core's default epsilon in the post norms alone, as in Megatron-Bridge 0.6.2."""
    from exaone_bridge.modules import post_norm

    class Forgetful(post_norm.TorchRMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
            super().__init__(config, hidden_size)

    return patched("exaone_bridge.modules.post_norm.RowParallelLinearLayerNorm.norm", Forgetful)()


def _softmax_scale() -> Any:
    """hidden / heads where head_dim is another."""
    from exaone_bridge.modules.attention import TorchDotProductAttention

    right = TorchDotProductAttention._attend

    def attend(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.softmax_scale = (64 / 4) ** -0.5
        return right(self, query, key, value)

    return patched("exaone_bridge.modules.attention.TorchDotProductAttention._attend", attend)()


def _weights(name: str, change: Any, layer: int | None, sublayer: str | None) -> Fault:
    begins = None if sublayer is None else (layer, sublayer)
    caught = ("tensors",) if sublayer is None else ("tensors", "logits")
    return Fault(name=name, model=MODEL, caught=caught, begins=begins, weights=change)


def _provider(
    name: str, layer: int, sublayer: str, *, exported: bool = True, **fields: Any
) -> Fault:
    """`exported`: the configuration has words for it, so that the exported one differs too."""
    caught = ("config", "logits") if exported else ("refused", "logits")
    return Fault(name=name, model=MODEL, caught=caught, begins=(layer, sublayer), provider=fields)


def _code(name: str, context: Any, layer: int, sublayer: str, *caught: str) -> Fault:
    return Fault(
        name=name, model=MODEL, caught=("logits", *caught), begins=(layer, sublayer), code=context
    )


_WINDOWED, _NOPE = [1, 1, 1, 0] * 2, [0, 0, 0, 1] * 2


def _flip(values: list[int], layer: int) -> list[int]:
    return [*values[:layer], 1 - values[layer], *values[layer + 1 :]]


EXAONE4_FAULTS: tuple[Fault, ...] = (
    _weights("two query heads change places", _swap_heads, 2, "attention"),
    _weights("keys and values of a layer swapped", _swap_key_value, 5, "attention"),
    _weights("q, k and v one after the other, not by group", _not_interleaved, 0, "attention"),
    _weights("gate and up of a layer swapped", _swap_gate_up, 1, "mlp"),
    _weights("output projection transposed", _transpose, 3, "attention"),
    _weights("layers 2 and 6 change places", _swap_layers, 2, "attention"),
    _weights("post norms of a layer swapped", _swap_post_norms, 4, "norm"),
    _weights("half of a projection lost", _lose_a_cut, 6, "mlp"),
    _weights("one bit of one weight", _one_bit, None, None),
    _weights("every weight rounded to bf16", _round_all, None, "embedding"),
    _weights("a query norm left at one", _reset_q_norm, 0, "norm"),
    _weights("words shifted by one", _roll_words, None, "embedding"),
    _weights("two words of the output layer swapped", _swap_words_out, None, "output layer"),
    _weights("final norm scaled", _double_final_norm, None, "norm"),
    _provider("window off by one", 0, "attention", window_size=(8, 0)),
    _provider(
        "no window", 0, "attention", exported=False, window_size=None, window_attn_skip_freq=None
    ),
    _provider(
        "layer 5 global", 5, "attention", exported=False, window_attn_skip_freq=_flip(_WINDOWED, 5)
    ),
    _provider(
        "layer 3 windowed",
        3,
        "attention",
        exported=False,
        window_attn_skip_freq=_flip(_WINDOWED, 3),
    ),
    _provider(
        "NoPE inverted", 0, "attention", exported=False, no_rope_freq=[1 - none for none in _NOPE]
    ),
    _provider(
        "RoPE on a global layer", 7, "attention", exported=False, no_rope_freq=_flip(_NOPE, 7)
    ),
    _provider(
        "no RoPE on a windowed layer", 1, "attention", exported=False, no_rope_freq=_flip(_NOPE, 1)
    ),
    _provider("RoPE on every layer", 3, "attention", exported=False, no_rope_freq=[0] * 8),
    _provider("RoPE factor 8 for 16", 0, "attention", rope_scaling_factor=8.0),
    _provider(
        "RoPE low frequency factor 2 for 1", 0, "attention", rope_scaling_low_freq_factor=2.0
    ),
    _provider(
        "RoPE high frequency factor 8 for 4", 0, "attention", rope_scaling_high_freq_factor=8.0
    ),
    _provider(
        "RoPE made for 8192 positions, not 32",
        0,
        "attention",
        rope_scaling_original_max_positions=8192,
    ),
    _provider("RoPE not scaled", 0, "attention", rope_scaling=False),
    _provider("theta off by one percent", 0, "attention", rotary_base=10100.0),
    _provider("epsilon 1e-5 for 3e-4", 0, "norm", layernorm_epsilon=1e-5),
    Fault(
        name="GELU for SiLU",
        model=MODEL,
        caught=("logits",),
        begins=(0, "mlp"),
        provider={"activation_func": torch.nn.functional.gelu},
    ),
    Fault(
        name="output layer tied",
        model=MODEL,
        caught=("refused",),
        provider={"share_embeddings_and_output_weights": True},
    ),
    _code("gate and up swapped in the table", _reorder("linear_fc1", 1, 0), 0, "mlp"),
    _code("keys and values swapped in the table", _reorder("linear_qkv", 0, 2, 1), 0, "attention"),
    _code(
        "post norms swapped in the table",
        mappings_changed(BRIDGE, _post_norms_in_the_table),
        0,
        "norm",
    ),
    _code("epsilon of the post norms alone", _post_norm_epsilon, 0, "norm"),
    _code("softmax scale of another head size", _softmax_scale, 0, "attention"),
    Fault(
        name="a row missing",
        model=MODEL,
        caught=("refused",),
        code=mappings_changed(BRIDGE, _no_down),
    ),
)
