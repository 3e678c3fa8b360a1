"""ERNIE 4.5's config: reading, rejecting, writing. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models import family_of
from exaone_bridge.models.ernie45.config import (
    Ernie45ModelConfig,
    first_pool,
    read_hf_config,
    write_hf_config,
)
from exaone_bridge.models.ernie45.tiny import TINY
from exaone_bridge.models.ernie45.weights import ernie45_mappings
from exaone_bridge.schema.param_mapping import aliases, expected_hf, expected_megatron, fp32_names

_COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "use_cache": True,
    "vocab_size": 103424,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": None,
}
_MOE = _COMMON | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "moe_num_experts": 64,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "0.3B": _COMMON
    | {
        "architectures": ["Ernie4_5_ForCausalLM"],
        "model_type": "ernie4_5",
        "hidden_size": 1024,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "21B": _MOE
    | {
        "hidden_size": 2560,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 27,
        "moe_layer_interval": 1,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": True,
    },
    "300B": _MOE
    | {
        "hidden_size": 8192,
        "num_hidden_layers": 54,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "moe_k": 8,
        "moe_num_shared_experts": 0,
        "moe_intermediate_size": 3584,
        "moe_layer_start_index": 3,
        "moe_layer_end_index": 53,
        "moe_layer_interval": 1,
        "tie_word_embeddings": False,
    },
}


def _small(**fields: Any) -> dict[str, Any]:
    config = {**TINY["ernie45-300b"], **fields}
    return {key: value for key, value in config.items() if value is not ...}


def test_published() -> None:
    dense, small, large = (read_hf_config(PUBLISHED[name]) for name in ("0.3B", "21B", "300B"))
    assert (dense.moe_layers, dense.num_experts, dense.tied, dense.head_dim) == ((), 0, True, 128)
    assert dense.moe is None and dense.mtp is None
    assert small.moe is not None and small.mtp is not None and large.moe is not None
    assert (small.moe_layers, small.num_experts, small.moe.topk) == (tuple(range(1, 28)), 64, 6)
    assert (small.moe.shared_ffn_size, small.head_dim, small.mtp.depth) == (3072, 128, 1)
    assert large.moe_layers == tuple(range(3, 54))
    assert (large.moe.num_shared_experts, large.tied, large.mtp) == (0, False, None)
    assert (large.moe.topk, large.moe.expert_ffn_size, large.head_dim) == (8, 3584, 128)
    assert {model_config.dtype for model_config in (dense, small, large)} == {"bfloat16"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_of_the_published_models(name: str) -> None:
    """0.36, 21.8 and 300 billion, as their names say."""
    model_config = read_hf_config(PUBLISHED[name])
    shapes = expected_hf(ernie45_mappings(model_config), model_config.dims)
    total = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    low, high = {"0.3B": (0.35e9, 0.37e9), "21B": (21.0e9, 22.0e9), "300B": (295e9, 305e9)}[name]
    assert low < total < high


def test_aliases_of_the_sequential_expert_layout() -> None:
    model_config = read_hf_config(TINY["ernie45"])
    mappings = ernie45_mappings(model_config)
    found = aliases(mappings)
    assert found["decoder.layers.2.mlp.experts.local_experts.5.linear_fc1.weight"] == (
        "decoder.layers.2.mlp.experts.linear_fc1.weight5"
    )
    assert set(found.values()) == {
        name for name in expected_megatron(mappings) if ".mlp.experts." in name
    }
    assert len(found) == 3 * 8 * 2
    fp32 = {
        name
        for name in expected_hf(mappings, model_config.dims)
        if "mlp.gate.weight" in name or "moe_statics" in name
    }
    assert fp32_names(mappings) == fp32 and len(fp32) == 6


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, (3, 5, 7)),
        ({"moe_layer_interval": 1}, (3, 4, 5, 6, 7)),
        ({"moe_layer_interval": 1, "moe_layer_end_index": 5}, (3, 4, 5)),
        ({"moe_layer_interval": 1, "moe_layer_end_index": -1}, (3, 4, 5, 6, 7)),
        ({"moe_layer_interval": 3, "moe_layer_start_index": 0}, (2, 5)),
        ({"moe_layer_start_index": [3, 3], "moe_layer_end_index": [5, 5]}, (3, 5)),
        ({"moe_layer_start_index": 8}, ()),
        ({"mlp_layer_types": ["sparse", "dense"] * 4}, (0, 2, 4, 6)),
    ],
)
def test_schedule(fields: dict[str, Any], layers: tuple[int, ...]) -> None:
    model_config = read_hf_config(_small(**fields))
    assert model_config.moe_layers == layers
    assert bool(model_config.num_experts) == bool(layers)


def test_null_in_a_dense_config() -> None:
    derived = read_hf_config({**PUBLISHED["0.3B"], "head_dim": None, "num_key_value_heads": None})
    assert (derived.head_dim, derived.num_kv_heads) == (64, 16)
    absent = {
        key: value
        for key, value in PUBLISHED["0.3B"].items()
        if key not in ("head_dim", "num_key_value_heads")
    }
    assert (read_hf_config(absent).head_dim, read_hf_config(absent).num_kv_heads) == (128, 2)


def test_first_pool() -> None:
    assert [first_pool({"n": value}, "n") for value in (64, [64], [64, 32], (8,))] == [
        64,
        64,
        64,
        8,
    ]
    with pytest.raises(UnsupportedConfig, match="each pool"):
        first_pool({"n": [1, 2, 3]}, "n")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_bias": 1}, "use_bias"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
        ({"num_key_value_heads": None}, "num_key_value_heads"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": None}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"moe_k": 9}, "moe_k"),
        ({"moe_num_experts": []}, "moe_num_experts"),
        ({"moe_num_experts": [8, 8, 8]}, "moe_num_experts"),
        ({"moe_num_shared_experts": -1}, "moe_num_shared_experts"),
        ({"moe_layer_interval": 0}, "moe_layer_interval"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["sparse", "moe"] * 4}, "mlp_layer_types"),
        ({"dtype": "int8"}, "dtype"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ],
)
def test_rejected(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedConfig) as caught:
        read_hf_config(_small(**fields))
    assert caught.value.field == named


@pytest.mark.parametrize("name", [*PUBLISHED, *TINY])
def test_unchanged_config(name: str) -> None:
    config = PUBLISHED.get(name) or TINY[name]
    assert write_hf_config(read_hf_config(config), config) == config


@pytest.mark.parametrize("source", [*PUBLISHED, None])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 8, "num_kv_heads": 4, "head_dim": 10},
        {"rope_theta": 77.0},
        {"dtype": "float32"},
        {"bias": True, "head_bias": True},
        {"tied": False, "vocab_size": 99, "norm_eps": 0.5},
        {"mtp": None},
        {"num_layers": 6, "moe": {"layer_mask": (False, True) * 3}},
        {"num_layers": 3, "moe": {"layer_mask": (True, False, False)}},
        {
            "moe": {
                "num_shared_experts": 3,
                "topk": 2,
                "norm_min": 0.1,
                "num_experts": 4,
                "expert_ffn_size": 12,
            }
        },
    ],
    ids=str,
)
def test_changes_round_trip(source: str | None, changes: dict[str, Any]) -> None:
    config = PUBLISHED[source or "21B"]
    before = read_hf_config(config)
    if "moe" in changes:
        if before.moe is None:
            return  # a dense config cannot express experts
        changes = changes | {"moe": dataclasses.replace(before.moe, **changes["moe"])}
    model_config = dataclasses.replace(before, **changes)
    if source == "0.3B":
        model_config = dataclasses.replace(model_config, head_bias=False)
    if source is None:
        model_config = dataclasses.replace(model_config, init_std=0.3, max_positions=11)
    assert read_hf_config(write_hf_config(model_config, config if source else {})) == model_config


def test_head_dim_is_written_where_the_source_has_null() -> None:
    source = {**PUBLISHED["0.3B"], "head_dim": None}
    changed = dataclasses.replace(read_hf_config(source), num_heads=8)
    assert changed.head_dim == 64
    assert read_hf_config(write_hf_config(changed, source)) == changed


def test_schedule_that_the_config_cannot_express() -> None:
    model_config = read_hf_config(PUBLISHED["21B"])
    assert model_config.moe is not None
    moe = dataclasses.replace(model_config.moe, layer_mask=(True, True, False, True))
    gaps = dataclasses.replace(model_config, num_layers=4, moe=moe)
    with pytest.raises(UnsupportedConfig, match="moe_layer_freq"):
        write_hf_config(gaps, PUBLISHED["21B"])


def test_defaults_match_transformers() -> None:
    from transformers import Ernie4_5_MoeConfig, Ernie4_5Config

    for config_class, architecture in (
        (Ernie4_5Config, "Ernie4_5ForCausalLM"),
        (Ernie4_5_MoeConfig, "Ernie4_5_MoeForCausalLM"),
    ):
        bare = {"architectures": [architecture], "model_type": config_class.model_type}
        assert read_hf_config(bare) == read_hf_config(bare | config_class().to_dict())


def test_family_supports_every_architecture_name() -> None:
    for architecture in ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5_MoeForCausalLM"):
        assert family_of([architecture], where="test").name == "ernie45"
    assert Ernie45ModelConfig.__dataclass_params__.frozen  # type: ignore[attr-defined]
