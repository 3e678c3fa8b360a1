"""EXAONE 4.5's config: reading and writing, nested keys too, and rejecting. No torch."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.config import read_hf_config as read_text
from exaone_bridge.models.exaone45.config import read_hf_config, write_hf_config
from exaone_bridge.models.exaone45.tiny import TINY
from exaone_bridge.models.exaone45.weights import (
    exaone45_mappings,
    passthrough_tensors,
    without_passthrough,
)
from exaone_bridge.schema.param_mapping import expected_hf

CONFIG = TINY["exaone45"]


def _with(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    outer, _, inner = path.rpartition(".")
    (config[outer] if outer else config)[inner] = value
    return config


def test_language_model_is_exaone4() -> None:
    model_config = read_hf_config(CONFIG)
    assert model_config.text == read_text(CONFIG["text_config"])
    assert (model_config.vision.qkv_size, model_config.vision.head_dim) == (96, 12)
    assert (
        model_config.image_token_id,
        model_config.video_token_id,
        model_config.mtp.num_layers,
        model_config.mtp.loss_scale,
    ) == (
        67,
        68,
        1,
        0.1,
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tie_word_embeddings", True),
        ("text_config.tie_word_embeddings", True),  # which Transformers ignores
        ("text_config.model_type", "exaone4_5_text"),
        ("image_token_id", 5),
        ("vision_config.window_size", 8),
        ("vision_config.rope_parameters", {"rope_type": "axial", "rope_theta": 10000.0}),
        ("text_config.sliding_window", 3),
        ("vision_config", None),
    ],
)
def test_unchanged_config(path: str, value: Any) -> None:
    config = _with(path, value)
    if value is None:
        config["text_config"]["hidden_size"] = 3584  # the vision encoder's default
    assert write_hf_config(read_hf_config(config), config) == config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tie_word_embeddings", True),
        ("image_token_id", 5),
        ("video_token_id", 5),
        ("vision_config.depth", 2),
        ("vision_config.num_key_value_heads", 1),
        ("vision_config.fullatt_block_indexes", [0]),
        ("text_config.num_hidden_layers", 8),
        ("text_config.intermediate_size", 32),
        ("text_config.rms_norm_eps", 1e-3),
        ("text_config.num_nextn_predict_layers", 2),
        ("text_config.mtp_share_layers", False),
        ("text_config.mtp_loss_scaling_factor", 0.3),
    ],
)
def test_changed_field(path: str, value: Any) -> None:
    wanted = _with(path, value)
    assert write_hf_config(read_hf_config(wanted), CONFIG) == wanted


def test_one_dtype_for_the_full_model() -> None:
    half = json.loads(json.dumps(CONFIG).replace("float32", "bfloat16"))
    assert write_hf_config(read_hf_config(half), CONFIG) == half
    with pytest.raises(UnsupportedConfig, match="one dtype for the full model"):
        read_hf_config(_with("vision_config.dtype", "bfloat16"))


def test_config_without_a_source() -> None:
    """Every field is written, and read as the same model config."""
    model_config = read_hf_config(CONFIG)
    assert read_hf_config(write_hf_config(model_config, {})) == model_config


def test_defaults_match_transformers() -> None:
    from transformers import Exaone4_5_VisionConfig

    reference = Exaone4_5_VisionConfig().to_dict()
    config = _with("vision_config", {})
    config["text_config"]["hidden_size"] = reference["out_hidden_size"]
    assert read_hf_config(config) == read_hf_config(
        config | {"vision_config": reference | {"dtype": "float32"}}
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision_config.out_hidden_size", 63, "take the place of token embeddings"),
        ("vision_config.num_key_value_heads", 3, "divisor"),
        ("vision_config.hidden_size", 40, "rotates pairs in rows and in columns"),
        ("vision_config.hidden_act", "gelu", "silu"),
        ("vision_config.rope_parameters", {"rope_theta": 500.0}, "rope_theta 10000"),
        ("vision_config.rope_parameters", {"rope_type": "default"}, "axial"),
        ("vision_config.patch_size", [4, 4], "patch_size"),
        ("vision_config.window_size", 4, "side of one token"),
        ("vision_config.fullatt_block_indexes", "1,3", "list of block numbers"),
        ("vision_config.model_type", "qwen2_5_vl", "exaone4_5_vision"),
        ("text_config.model_type", "llama", "exaone4"),
        ("text_config", 3, "an object"),
        ("text_config.layer_types", ["full"], "layer_types"),
        ("text_config.dtype", 0, "dtype is 0"),
        ("vision_config.dtype", ["float32"], "dtype is \\['float32'\\]"),
        ("text_config.mtp_share_layers", 1, "mtp_share_layers"),
        ("image_token_id", 387, "vocab_size"),
        ("image_token_id", 68, "another token"),
    ],
)
def test_rejected(path: str, value: Any, message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        read_hf_config(_with(path, value))


def test_passthrough_tensors_of_mtp() -> None:
    model_config = read_hf_config(CONFIG)
    shapes = {
        tensor.name: tensor.shape(model_config.dims) for tensor in passthrough_tensors(model_config)
    }
    assert shapes["mtp.fc.weight"] == (64, 128)
    assert shapes["mtp.layers.0.self_attn.q_norm.weight"] == (24,)
    assert len(shapes) == 15
    assert (
        not shapes.keys() & expected_hf(exaone45_mappings(model_config), model_config.dims).keys()
    )
    assert passthrough_tensors(without_passthrough(model_config)) == ()
    two = read_hf_config(_with("text_config.num_nextn_predict_layers", 2))
    assert len(passthrough_tensors(two)) == 15  # shared
    separate = write_hf_config(two, CONFIG)
    separate["text_config"]["mtp_share_layers"] = False
    assert len(passthrough_tensors(read_hf_config(separate))) == 15 + 11
