"""Parameter mappings: EXAONE 4.0's against a real Exaone4ForCausalLM, and their own rules."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest

from exaone_bridge.models.exaone4.config import read_hf_config
from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.models.exaone4.weights import exaone4_mappings
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema import mapping_groups
from exaone_bridge.schema.param_mapping import (
    HFTensor,
    MappingKind,
    ParamMapping,
    expected_hf,
    expected_megatron,
)
from exaone_bridge.verification.activations.probe_points import probe_points

MODELS: dict[str, dict[str, Any]] = {
    **TINY,
    "1.2B": CONFIGS["exaone4_1p2b"],
    "32B": CONFIGS["exaone4_32b"],
}

# One untied layer: Megatron-Core name -> kind, and Hugging Face names with their axes, in order.
ONE_LAYER = {
    "embedding.word_embeddings.weight": (MappingKind.VOCAB, "model.embed_tokens.weight VH"),
    "decoder.layers.0.self_attention.linear_qkv.weight": (
        MappingKind.QKV,
        "model.layers.0.self_attn.q_proj.weight QH",
        "model.layers.0.self_attn.k_proj.weight KH",
        "model.layers.0.self_attn.v_proj.weight KH",
    ),
    "decoder.layers.0.self_attention.q_layernorm.weight": (
        MappingKind.REPLICATED,
        "model.layers.0.self_attn.q_norm.weight D",
    ),
    "decoder.layers.0.self_attention.k_layernorm.weight": (
        MappingKind.REPLICATED,
        "model.layers.0.self_attn.k_norm.weight D",
    ),
    "decoder.layers.0.self_attention.linear_proj.weight": (
        MappingKind.ROW,
        "model.layers.0.self_attn.o_proj.weight HQ",
    ),
    "decoder.layers.0.self_attention.linear_proj.post_layernorm.weight": (
        MappingKind.REPLICATED,
        "model.layers.0.post_attention_layernorm.weight H",
    ),
    "decoder.layers.0.mlp.linear_fc1.weight": (
        MappingKind.GATED,
        "model.layers.0.mlp.gate_proj.weight FH",
        "model.layers.0.mlp.up_proj.weight FH",
    ),
    "decoder.layers.0.mlp.linear_fc2.weight": (
        MappingKind.ROW,
        "model.layers.0.mlp.down_proj.weight HF",
    ),
    "decoder.layers.0.mlp.linear_fc2.post_layernorm.weight": (
        MappingKind.REPLICATED,
        "model.layers.0.post_feedforward_layernorm.weight H",
    ),
    "decoder.final_layernorm.weight": (MappingKind.REPLICATED, "model.norm.weight H"),
    "output_layer.weight": (MappingKind.VOCAB, "lm_head.weight VH"),
}


def one_layer(**changes: Any) -> tuple[ParamMapping, ...]:
    config = TINY["exaone4"] | {"num_hidden_layers": 1, "layer_types": ["full_attention"]} | changes
    return exaone4_mappings(read_hf_config(config))


# --- EXAONE 4.0's mappings ---


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_match_transformers(name: str) -> None:
    import torch
    from transformers import Exaone4Config, Exaone4ForCausalLM

    config, model_config = MODELS[name], read_hf_config(MODELS[name])
    with torch.device("meta"):
        model = Exaone4ForCausalLM(Exaone4Config(**copy.deepcopy(config)))
    real = {
        key: tuple(tensor.shape) for key, tensor in model.named_parameters()
    }  # a tied lm_head is not repeated
    assert expected_hf(exaone4_mappings(model_config), model_config.dims) == real
    assert ("lm_head.weight" in real) == (not config["tie_word_embeddings"])

    stored = {
        key for key in model.state_dict() if not (model_config.tied and key == "lm_head.weight")
    }
    assert stored == set(real)  # nothing that save_pretrained would write is left out


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_on_both_sides(name: str) -> None:
    model_config = read_hf_config(MODELS[name])
    megatron_names: Counter[str] = Counter()
    hf_names: Counter[str] = Counter()
    for mapping in exaone4_mappings(model_config):
        for megatron, hf in mapping.expand():
            megatron_names[megatron] += 1
            hf_names.update(tensor.name for tensor in hf)
    for names in (megatron_names, hf_names):
        assert set(names.values()) == {1}
        assert not [found for found in names if "*" in found]
    assert set(megatron_names) == expected_megatron(exaone4_mappings(model_config))
    tied = MODELS[name]["tie_word_embeddings"]
    assert len(megatron_names) == 2 + 8 * model_config.num_layers + (0 if tied else 1)
    assert len(hf_names) == 2 + 11 * model_config.num_layers + (0 if tied else 1)


def test_mappings_of_one_layer() -> None:
    found = {
        megatron: (mapping.kind, *(f"{tensor.name} {tensor.axes}" for tensor in hf))
        for mapping in one_layer(tie_word_embeddings=False)
        for megatron, hf in mapping.expand()
    }
    assert found == ONE_LAYER
    assert expected_megatron(one_layer(tie_word_embeddings=False)) == ONE_LAYER.keys()
    assert expected_megatron(one_layer(tie_word_embeddings=True)) == ONE_LAYER.keys() - {
        "output_layer.weight"
    }


def test_layers_are_numbered_from_zero() -> None:
    mappings = exaone4_mappings(read_hf_config(TINY["exaone4"]))
    for names, prefix in (
        (expected_megatron(mappings), "decoder.layers."),
        (expected_hf(mappings, _DIMS), "model.layers."),
    ):
        numbers = {int(name.split(".")[2]) for name in names if name.startswith(prefix)}
        assert numbers == set(range(8))


def test_kinds_in_use() -> None:
    assert {mapping.kind.value for mapping in one_layer()} == {
        "row",
        "replicated",
        "vocab",
        "qkv",
        "gated",
    }


# --- any mappings ---

_DIMS = {"V": 11, "H": 7, "F": 5, "D": 2, "Q": 8, "K": 4}


def test_shape_of_axes() -> None:
    assert HFTensor("a", "VH").shape(_DIMS) == (11, 7)
    assert HFTensor("a", "HV").shape(_DIMS) == (7, 11)
    assert HFTensor("a", "D").shape(_DIMS) == (2,)
    assert HFTensor("a", "").shape(_DIMS) == ()
    with pytest.raises(KeyError):
        HFTensor("a", "X").shape(_DIMS)


def test_expand_per_layer() -> None:
    mapping = ParamMapping(
        MappingKind.GATED, "d.*.fc", (HFTensor("m.*.gate", "FH"), HFTensor("m.*.up", "FH")), (3, 10)
    )
    assert list(mapping.expand()) == [
        ("d.3.fc", (HFTensor("m.3.gate", "FH"), HFTensor("m.3.up", "FH"))),
        ("d.10.fc", (HFTensor("m.10.gate", "FH"), HFTensor("m.10.up", "FH"))),
    ]
    assert mapping.megatron == "d.*.fc"  # the mapping itself does not change


def test_expand_outside_the_layers() -> None:
    mapping = ParamMapping(MappingKind.VOCAB, "embedding", (HFTensor("embed", "VH"),))
    assert list(mapping.expand()) == [("embedding", (HFTensor("embed", "VH"),))]


def test_expected_names_of_all_mappings() -> None:
    mappings = (
        ParamMapping(MappingKind.VOCAB, "embedding", (HFTensor("embed", "VH"),)),
        ParamMapping(
            MappingKind.QKV, "d.*.qkv", (HFTensor("m.*.q", "QH"), HFTensor("m.*.k", "KH")), (0, 1)
        ),
    )
    assert expected_megatron(mappings) == {"embedding", "d.0.qkv", "d.1.qkv"}
    assert expected_hf(mappings, _DIMS) == {
        "embed": (11, 7),
        "m.0.q": (8, 7),
        "m.0.k": (4, 7),
        "m.1.q": (8, 7),
        "m.1.k": (4, 7),
    }
    assert expected_megatron(()) == set() and expected_hf((), _DIMS) == {}


# --- groups ---


def test_groups_without_layers_have_no_mappings() -> None:
    """A model in which no layer has a module needs no case of its own."""
    empty = (
        *mapping_groups.attention_mappings((), bias=True),
        *mapping_groups.qk_norm_mappings(()),
        *mapping_groups.swiglu_mappings((), bias=True),
        *mapping_groups.shared_expert_mappings(()),
        *mapping_groups.expert_mappings((), 8),
        *mapping_groups.router_mappings((), weight="gate.weight", selection_bias="bias"),
        *mapping_groups.pre_norm_mappings((), ()),
        *mapping_groups.post_norm_mappings((), attention="a", mlp="b"),
    )
    assert empty == ()


def test_probe_points_of_a_dense_pre_norm_model() -> None:
    """No layer has a router, so there is no norm before one."""
    layers = (0, 1)
    mappings = (
        *mapping_groups.pre_norm_mappings(layers),
        *mapping_groups.attention_mappings(layers),
        *mapping_groups.swiglu_mappings(layers),
    )
    norms = [point for point in probe_points(mappings) if point.sublayer == "norm"]
    assert {(point.layer, point.hf.split(".")[-1]) for point in norms} == {
        (layer, name)
        for layer in layers
        for name in ("input_layernorm", "post_attention_layernorm")
    }


def test_per_layer_mapping_without_layers_raises() -> None:
    with pytest.raises(ValueError, match=r"d\.\*\.fc has no layers"):
        ParamMapping(MappingKind.ROW, "d.*.fc", (HFTensor("m.*.fc", "HF"),))
