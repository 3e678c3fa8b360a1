"""The table of rows against the names and shapes of a real Exaone4ForCausalLM, and against a hand-written layer."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from exaone_bridge.models.exaone4.config import read_config
from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.models.exaone4.weights import exaone4_rows
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.param_mapping import HFTensor, Kind, Row, expected_hf, expected_megatron

MODELS: dict[str, dict[str, Any]] = {
    **TINY,
    "1.2B": CONFIGS["exaone4_1p2b"],
    "32B": CONFIGS["exaone4_32b"],
}

# One untied layer: Megatron-Core name -> kind, and Hugging Face names with their axes, in order.
ONE_LAYER = {
    "embedding.word_embeddings.weight": (Kind.VOCAB, "model.embed_tokens.weight VH"),
    "decoder.layers.0.self_attention.linear_qkv.weight": (
        Kind.QKV,
        "model.layers.0.self_attn.q_proj.weight QH",
        "model.layers.0.self_attn.k_proj.weight KH",
        "model.layers.0.self_attn.v_proj.weight KH",
    ),
    "decoder.layers.0.self_attention.q_layernorm.weight": (
        Kind.REPLICATED,
        "model.layers.0.self_attn.q_norm.weight D",
    ),
    "decoder.layers.0.self_attention.k_layernorm.weight": (
        Kind.REPLICATED,
        "model.layers.0.self_attn.k_norm.weight D",
    ),
    "decoder.layers.0.self_attention.linear_proj.weight": (
        Kind.ROW,
        "model.layers.0.self_attn.o_proj.weight HQ",
    ),
    "decoder.layers.0.self_attention.linear_proj.post_layernorm.weight": (
        Kind.REPLICATED,
        "model.layers.0.post_attention_layernorm.weight H",
    ),
    "decoder.layers.0.mlp.linear_fc1.weight": (
        Kind.GATED,
        "model.layers.0.mlp.gate_proj.weight FH",
        "model.layers.0.mlp.up_proj.weight FH",
    ),
    "decoder.layers.0.mlp.linear_fc2.weight": (Kind.ROW, "model.layers.0.mlp.down_proj.weight HF"),
    "decoder.layers.0.mlp.linear_fc2.post_layernorm.weight": (
        Kind.REPLICATED,
        "model.layers.0.post_feedforward_layernorm.weight H",
    ),
    "decoder.final_layernorm.weight": (Kind.REPLICATED, "model.norm.weight H"),
    "output_layer.weight": (Kind.VOCAB, "lm_head.weight VH"),
}


def one_layer(**changes: Any) -> tuple[Row, ...]:
    config = TINY["exaone4"] | {"num_hidden_layers": 1, "layer_types": ["full_attention"]} | changes
    return exaone4_rows(read_config(config))


# --- EXAONE 4.0's table ---


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_transformers_model(name: str) -> None:
    import torch
    from transformers import Exaone4Config, Exaone4ForCausalLM

    config, facts = MODELS[name], read_config(MODELS[name])
    with torch.device("meta"):
        model = Exaone4ForCausalLM(Exaone4Config(**copy.deepcopy(config)))
    real = {
        key: tuple(tensor.shape) for key, tensor in model.named_parameters()
    }  # a tied lm_head is not repeated
    assert expected_hf(exaone4_rows(facts), facts.dims) == real
    assert ("lm_head.weight" in real) == (not config["tie_word_embeddings"])

    stored = {key for key in model.state_dict() if not (facts.tied and key == "lm_head.weight")}
    assert stored == set(real)  # nothing that save_pretrained would write is left out


@pytest.mark.parametrize("name", MODELS)
def test_no_name_comes_twice_on_either_side(name: str) -> None:
    facts = read_config(MODELS[name])
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    for row in exaone4_rows(facts):
        for megatron, hf in row.expand():
            ours[megatron] += 1
            theirs.update(tensor.name for tensor in hf)
    for names in (ours, theirs):
        assert set(names.values()) == {1}
        assert not [found for found in names if "*" in found]
    assert set(ours) == expected_megatron(exaone4_rows(facts))
    tied = MODELS[name]["tie_word_embeddings"]
    assert len(ours) == 2 + 8 * facts.num_layers + (0 if tied else 1)
    assert len(theirs) == 2 + 11 * facts.num_layers + (0 if tied else 1)


def test_one_layer_by_hand() -> None:
    found = {
        megatron: (row.kind, *(f"{tensor.name} {tensor.axes}" for tensor in hf))
        for row in one_layer(tie_word_embeddings=False)
        for megatron, hf in row.expand()
    }
    assert found == ONE_LAYER
    assert expected_megatron(one_layer(tie_word_embeddings=False)) == ONE_LAYER.keys()
    assert expected_megatron(one_layer(tie_word_embeddings=True)) == ONE_LAYER.keys() - {
        "output_layer.weight"
    }


def test_layers_are_numbered_globally_from_zero() -> None:
    rows = exaone4_rows(read_config(TINY["exaone4"]))
    for names, prefix in (
        (expected_megatron(rows), "decoder.layers."),
        (expected_hf(rows, _DIMS), "model.layers."),
    ):
        numbers = {int(name.split(".")[2]) for name in names if name.startswith(prefix)}
        assert numbers == set(range(8))


def test_the_kinds_that_are_used() -> None:
    assert {row.kind.value for row in one_layer()} == {"row", "replicated", "vocab", "qkv", "gated"}


# --- rows as such ---

_DIMS = {"V": 11, "H": 7, "F": 5, "D": 2, "Q": 8, "K": 4}


def test_a_shape_follows_its_axes() -> None:
    assert HFTensor("a", "VH").shape(_DIMS) == (11, 7)
    assert HFTensor("a", "HV").shape(_DIMS) == (7, 11)
    assert HFTensor("a", "D").shape(_DIMS) == (2,)
    assert HFTensor("a", "").shape(_DIMS) == ()
    with pytest.raises(KeyError):
        HFTensor("a", "X").shape(_DIMS)


def test_expand_gives_each_layer_its_own_names() -> None:
    row = Row(Kind.GATED, "d.*.fc", (HFTensor("m.*.gate", "FH"), HFTensor("m.*.up", "FH")), (3, 10))
    assert list(row.expand()) == [
        ("d.3.fc", (HFTensor("m.3.gate", "FH"), HFTensor("m.3.up", "FH"))),
        ("d.10.fc", (HFTensor("m.10.gate", "FH"), HFTensor("m.10.up", "FH"))),
    ]
    assert row.megatron == "d.*.fc"  # the row itself is left alone


def test_a_row_outside_the_layers_expands_to_itself() -> None:
    row = Row(Kind.VOCAB, "embedding", (HFTensor("embed", "VH"),))
    assert list(row.expand()) == [("embedding", (HFTensor("embed", "VH"),))]


def test_expected_names_come_from_every_row_and_layer() -> None:
    rows = (
        Row(Kind.VOCAB, "embedding", (HFTensor("embed", "VH"),)),
        Row(Kind.QKV, "d.*.qkv", (HFTensor("m.*.q", "QH"), HFTensor("m.*.k", "KH")), (0, 1)),
    )
    assert expected_megatron(rows) == {"embedding", "d.0.qkv", "d.1.qkv"}
    assert expected_hf(rows, _DIMS) == {
        "embed": (11, 7),
        "m.0.q": (8, 7),
        "m.0.k": (4, 7),
        "m.1.q": (8, 7),
        "m.1.k": (4, 7),
    }
    assert expected_megatron(()) == set() and expected_hf((), _DIMS) == {}
