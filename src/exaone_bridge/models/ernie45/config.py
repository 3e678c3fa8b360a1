"""ERNIE 4.5's config.json <-> model config. No torch.

It reads config.json of the dense and of the mixture-of-experts architecture, as Transformers 4 and
5 write it, and `to_dict()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_config import (
    boolean,
    check_types,
    non_negative_float,
    positive_int,
    read_head_dim,
    read_int,
    read_rope,
    update_hf_config,
)
from exaone_bridge.schema.hf_field import hf_field
from exaone_bridge.schema.hf_spelling import write_rope
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_config import ModelConfig, MoEConfig, MTPConfig

__all__ = [
    "ARCHITECTURES",
    "DENSE",
    "MOE",
    "Ernie45MoEConfig",
    "Ernie45ModelConfig",
    "first_pool",
    "read_hf_config",
    "write_hf_config",
]

DENSE, MOE = "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM"
# The last is how published dense configs name the architecture.
ARCHITECTURES = (MOE, DENSE, "Ernie4_5_ForCausalLM")
MODEL_TYPES = {DENSE: "ernie4_5", MOE: "ernie4_5_moe"}

# Lists [N] or [N, N] in some configs, a value for each pool of experts; text models have the first.
LISTED = (
    "moe_num_experts",
    "moe_intermediate_size",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_k",
    "moe_num_shared_experts",
)

# What Transformers takes where config.json has no such key
# (transformers/models/ernie4_5/configuration_ernie4_5.py,
# transformers/models/ernie4_5_moe/configuration_ernie4_5_moe.py, 5.12.1).
_DEFAULTS = {
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": False,
    "rope_theta": 500000.0,
    "num_nextn_predict_layers": 0,  # which Transformers ignores
}
_DENSE_DEFAULTS = _DEFAULTS | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
_MOE_DEFAULTS = _DEFAULTS | {
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_norm_min": 1e-12,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ernie45MoEConfig(MoEConfig):
    """ERNIE 4.5's mixture of experts.

    Attributes:
        norm_min: the least sum that the weights of a token's experts are divided by.
    """

    num_experts: int = hf_field(
        "moe_num_experts", read=positive_int, provider="num_moe_experts", axis="E"
    )
    topk: int = hf_field("moe_k", read=positive_int, provider="moe_router_topk")
    num_shared_experts: int = hf_field(
        "moe_num_shared_experts", read=lambda hf_config, key: read_int(hf_config, key, least=0)
    )
    norm_min: float = hf_field("moe_norm_min", read=non_negative_float, provider="moe_norm_min")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ernie45ModelConfig(ModelConfig):
    """An ERNIE 4.5 model.

    Attributes:
        bias: biases on the projections of attention, MLP and shared experts, not of routed ones.
        head_bias: a bias on the output layer.
    """

    bias: bool = hf_field("use_bias", read=boolean, provider="add_bias_linear")
    head_bias: bool = hf_field(provider="output_bias")
    moe: Ernie45MoEConfig | None = None


def first_pool(hf_config: JSONMapping, key: str) -> Any:
    """Return the value of the first pool of experts: N of [N] and of [N, M], else the value.

    Raises:
        UnsupportedConfig: a list of another length.
    """
    value = hf_config.get(key)
    if not isinstance(value, list | tuple):
        return value
    if len(value) not in (1, 2):
        raise UnsupportedConfig(
            key, got=value, wanted="a number, [N] or [N, M]: a value for each pool of experts"
        )
    return value[0]


def _complete(hf_config: JSONMapping, is_moe: bool) -> JSONObject:
    """Return the config with Transformers' defaults, and with a number in place of each list."""
    complete = {
        **(_MOE_DEFAULTS if is_moe else _DENSE_DEFAULTS),
        **hf_config,
        **{key: first_pool(hf_config, key) for key in LISTED if key in hf_config},
    }
    # Ernie4_5Config.__post_init__ derives it; Ernie4_5_MoeConfig does not.
    if (
        hf_config.get("model_type") == MODEL_TYPES[DENSE]
        and complete["num_key_value_heads"] is None
    ):
        complete["num_key_value_heads"] = complete["num_attention_heads"]
    return complete


def read_hf_config(hf_config: JSONMapping) -> Ernie45ModelConfig:
    """Read an ERNIE 4.5 config.

    Args:
        hf_config: config.json as a mapping, or the Transformers config's `to_dict()`.

    Raises:
        UnsupportedConfig: a field that is malformed or not supported, or that Transformers cannot
            run.
    """
    is_moe = hf_config.get("model_type") == MODEL_TYPES[MOE] or MOE in (
        hf_config.get("architectures") or ()
    )
    hf_config = _complete(hf_config, is_moe)
    values = Ernie45ModelConfig.values_from_hf(hf_config)
    check_types(hf_config)
    layer_mask = _layer_mask(hf_config, values["num_layers"]) if is_moe else ()
    mtp_layers = read_int(hf_config, "num_nextn_predict_layers", least=0)
    return Ernie45ModelConfig(
        **values,
        # Ernie4_5Config derives null; Ernie4_5_MoeAttention.__init__ derives an absent one.
        head_dim=read_head_dim(hf_config, null_is_derived=not is_moe),
        rope_theta=read_rope(hf_config, known=("default",)).theta,
        head_bias=is_moe and values["bias"],  # Ernie4_5ForCausalLM's lm_head never has one
        moe=_read_moe(hf_config, layer_mask) if any(layer_mask) else None,
        mtp=MTPConfig(depth=mtp_layers) if mtp_layers else None,
    )


def _read_moe(hf_config: JSONMapping, layer_mask: tuple[bool, ...]) -> Ernie45MoEConfig:
    moe = Ernie45MoEConfig(**Ernie45MoEConfig.values_from_hf(hf_config), layer_mask=layer_mask)
    if moe.topk > moe.num_experts:
        wanted = f"at most moe_num_experts={moe.num_experts}"
        raise UnsupportedConfig("moe_k", got=moe.topk, wanted=wanted)
    return moe


def _layer_mask(hf_config: JSONMapping, num_layers: int) -> tuple[bool, ...]:
    """Return which layers are MoE layers (Ernie4_5_MoeDecoderLayer.__init__, 5.12.1).

    `mlp_layer_types` takes precedence over the three numbers.
    """
    kinds = hf_config.get("mlp_layer_types")
    if kinds is not None:
        known = ("dense", "sparse")
        if (
            not isinstance(kinds, list | tuple)
            or len(kinds) != num_layers
            or any(kind not in known for kind in kinds)
        ):
            wanted = (
                f"a list of {known[0]!r} and {known[1]!r}, "
                f"one for each of num_hidden_layers={num_layers}"
            )
            raise UnsupportedConfig("mlp_layer_types", got=kinds, wanted=wanted)
        return tuple(kind == "sparse" for kind in kinds)
    start = read_int(hf_config, "moe_layer_start_index", least=0)
    end = read_int(hf_config, "moe_layer_end_index", least=-1)
    interval = positive_int(hf_config, "moe_layer_interval")
    last = num_layers - 1 if end == -1 else end
    return tuple(
        (layer + 1) % interval == 0 and start <= layer <= last for layer in range(num_layers)
    )


def write_hf_config(model_config: Ernie45ModelConfig, source: JSONMapping) -> JSONObject:
    """Write config.json: `source` with the fields that differ in this model config.

    Args:
        model_config: of the model to be exported.
        source: the config.json that the model came from; empty for a model made without one.

    Raises:
        UnsupportedConfig: MoE layers that an ERNIE 4.5 config cannot express, or a bias on the
            output layer alone.
    """
    architecture = DENSE if model_config.moe is None else MOE
    hf_config, before = update_hf_config(
        model_config,
        source,
        read_hf_config,
        identity={"architectures": [architecture], "model_type": MODEL_TYPES[architecture]},
    )
    changed = model_config.changed_from(before)
    if model_config.moe is not None:
        hf_config |= model_config.moe.hf_values(None if before is None else before.moe)
    if "mtp" in changed:
        mtp = model_config.mtp
        hf_config["num_nextn_predict_layers"] = 0 if mtp is None else mtp.depth
    mask = model_config.moe_layer_mask
    if (before is None or before.moe_layer_mask != mask) and (
        hf_config["model_type"] == MODEL_TYPES[MOE]
    ):
        hf_config |= _write_layer_mask(mask)
        if "mlp_layer_types" in hf_config:
            hf_config["mlp_layer_types"] = ["sparse" if is_moe else "dense" for is_moe in mask]
    if "rope_theta" in changed:
        write_rope(hf_config, kind="default", theta=model_config.rope_theta)
    if source and read_hf_config(hf_config).head_bias != model_config.head_bias:
        raise UnsupportedConfig(
            "head_bias", got=model_config.head_bias, wanted="as use_bias says", where="provider"
        )
    return hf_config


def _write_layer_mask(mask: tuple[bool, ...]) -> dict[str, int]:
    """Return start, end and interval of these MoE layers."""
    layers = len(mask)
    moe_layers = [layer for layer, is_moe in enumerate(mask) if is_moe]
    if not moe_layers:  # a start after the last layer
        return {
            "moe_layer_start_index": layers,
            "moe_layer_end_index": layers - 1,
            "moe_layer_interval": 1,
        }
    for interval in range(1, layers + 1):
        fields = {
            "moe_layer_start_index": moe_layers[0],
            "moe_layer_end_index": moe_layers[-1],
            "moe_layer_interval": interval,
        }
        if _layer_mask(fields, layers) == mask:
            return fields
    raise UnsupportedConfig(
        "moe_layer_freq", got=mask, wanted="every n-th layer between two of them", where="provider"
    )
