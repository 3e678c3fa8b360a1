"""EXAONE MoE's config.json: what is read, written and rejected, and the published sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models import EXAONE_MOE, family_of
from exaone_bridge.models.exaone_moe.config import read_hf_config, write_hf_config
from exaone_bridge.models.exaone_moe.tiny import TINY
from exaone_bridge.recipes.published import CONFIGS

SMALL = TINY["exaone-moe"]
WITH_MTP = {
    "num_nextn_predict_layers": 1,
    "mtp_layer_types": ["full_attention"],
    "mtp_sliding_windows": [0],
}


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("k_exaone_236b_a23b", 18_688, 236_571_156_352),
        ("k_exaone_2_750b_a37b", 59_396, 748_828_971_520),
    ],
)
def test_tensors_of_the_published_models_are_counted(
    name: str, tensors: int, elements: int
) -> None:
    """The tensors include the 15 of multi-token prediction, the elements do not."""
    model = EXAONE_MOE.describe(CONFIGS[name] | WITH_MTP)
    assert len(model.hf_shapes) + len(model.passthrough_tensors) == tensors
    assert sum(math.prod(shape) for shape in model.hf_shapes.values()) == elements
    mtp = {tensor.name: tensor.shape(model.dims) for tensor in model.passthrough_tensors}
    assert sum(math.prod(shape) for shape in mtp.values()) == 528_513_280


@pytest.mark.parametrize("architecture", ["ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"])
def test_both_names_of_the_architecture_are_supported(architecture: str) -> None:
    assert family_of([architecture], where="config.json") is EXAONE_MOE


@pytest.mark.parametrize("name", [*TINY, "k_exaone_236b_a23b", "k_exaone_2_750b_a37b"])
def test_config_is_written_key_by_key_as_it_was_read(name: str) -> None:
    """Keys that nothing reads stay too."""
    source = {**(TINY | CONFIGS)[name], "some_future_key": [1, None]}
    assert write_hf_config(read_hf_config(source), source) == source


@pytest.mark.parametrize("name", TINY)
def test_config_without_a_source_is_read_back(name: str) -> None:
    model_config = read_hf_config(TINY[name])
    assert read_hf_config(write_hf_config(model_config, {})) == model_config


def test_head_dim_is_written_where_the_source_left_it_out() -> None:
    """Transformers would derive another one from the new number of heads."""
    source = {key: value for key, value in SMALL.items() if key != "head_dim"}
    changed = dataclasses.replace(read_hf_config(source), num_heads=8)
    assert changed.head_dim == 16
    assert read_hf_config(write_hf_config(changed, source)) == changed


def test_a_change_of_multi_token_prediction_is_read_back() -> None:
    """One step is written too where the source states another number."""
    source = TINY["exaone-moe-2"]
    before = read_hf_config(source)
    assert before.mtp is not None and before.mtp.steps == 4
    for mtp in (None, dataclasses.replace(before.mtp, steps=1, window=5)):
        changed = dataclasses.replace(before, mtp=mtp)
        assert read_hf_config(write_hf_config(changed, source)) == changed


def test_layers_follow_from_the_lists() -> None:
    model_config = read_hf_config(TINY["exaone-moe-2"])
    assert model_config.windows == (None, 9, 5, 5, 5, None)
    assert model_config.rope == (False, True, True, True, True, False)
    assert model_config.moe_layers == (2, 3, 4, 5)
    assert model_config.swiglu_limits == (0.0, 0.5, 0.0, 0.5, 0.5, 0.5)
    assert model_config.mtp is not None and model_config.mtp.steps == 4
    assert (
        model_config.transformers_differs
        == "Transformers ignores sliding_windows and swiglu_limits"
    )
    assert read_hf_config(SMALL).transformers_differs is None


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"sliding_windows": [5, 5, 0, 5]}, "sliding_windows"),
        ({"sliding_windows": [6, 6, 6, 0]}, "sliding_windows"),
        ({"sliding_windows": [5, 5, 5]}, "sliding_windows"),
        ({"sliding_windows": [5, 5, -1, 0]}, "sliding_windows"),
        (
            {"layer_types": ["full_attention"] * 4, "sliding_windows": [0] * 4},
            "sliding_windows",
        ),
        ({"sliding_window": None}, "sliding_window"),
        ({"layer_types": None, "sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"is_moe_layer": [True] * 4}, "is_moe_layer"),
        ({"mlp_layer_types": ["dense"] * 4, "is_moe_layer": None}, "mlp_layer_types"),
        ({"mlp_layer_types": ["sparse", "moe", "dense", "sparse"]}, "mlp_layer_types"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8, "topk_group": 4}, "n_group"),
        ({"n_group": 4, "topk_group": 1}, "n_group"),
        ({"num_shared_experts": 0}, "num_shared_experts"),
        ({"swiglu_limits": [0.5]}, "swiglu_limits"),
        ({"swiglu_limits": [-1.0] * 4}, "swiglu_limits"),
        ({"mtp_sliding_windows": [5]}, "mtp_sliding_windows"),
        ({"mtp_sliding_windows": 5}, "mtp_sliding_windows"),
        (
            {"mtp_layer_types": ["sliding_attention"], "mtp_sliding_windows": [-5]},
            "mtp_sliding_windows",
        ),
        ({"mtp_layer_types": ["chunked_attention"]}, "mtp_layer_types"),
        ({"mtp_layer_types": 1}, "mtp_layer_types"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": None}, "head_dim"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configs_that_disagree_or_are_not_supported_are_rejected(
    fields: dict[str, Any], key: str
) -> None:
    with pytest.raises(UnsupportedConfig, match=key):
        read_hf_config(SMALL | fields)
