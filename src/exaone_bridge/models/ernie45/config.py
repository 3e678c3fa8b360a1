"""ERNIE 4.5's Hugging Face configuration -> frozen facts. The only reader of it; no torch.

It reads `config.json` of the dense and of the mixture-of-experts architecture, as Transformers 4 and 5 write it, and
`to_dict()`; defaults are those of `transformers/models/ernie4_5/configuration_ernie4_5.py` and
`ernie4_5_moe/configuration_ernie4_5_moe.py` (5.12.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_config import (
    check_heads,
    check_types,
    read_count,
    read_dtype,
    read_flag,
    read_number,
    rewritten,
    rope_of,
)
from exaone_bridge.schema.model_family import dense_dims

__all__ = [
    "ARCHITECTURES",
    "DENSE",
    "MOE",
    "Ernie45ModelConfig",
    "first_pool",
    "read_hf_config",
    "write_hf_config",
]

DENSE, MOE = "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM"
ARCHITECTURES = (
    MOE,
    DENSE,
    "Ernie4_5_ForCausalLM",
)  # the last is how published dense configurations spell it
MODEL_TYPES = {DENSE: "ernie4_5", MOE: "ernie4_5_moe"}

# Lists [N] or [N, N] in some configurations: a value for each pool of experts, of which text models have the first.
LISTED = (
    "moe_num_experts",
    "moe_intermediate_size",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_k",
    "moe_num_shared_experts",
)
# transformers.models: what each class assumes where the file says nothing.
_DEFAULTS: dict[bool, dict[str, int]] = {
    False: {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    True: {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ernie45ModelConfig:
    """What an ERNIE 4.5 model is, whatever spelling said so. Sizes are counts of elements."""

    vocab_size: int
    hidden_size: int
    ffn_size: int  # of a dense layer
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    init_std: float
    tied: bool
    rope_theta: float
    bias: bool  # on attention and feed-forward projections, shared experts included; routed experts have none
    head_bias: bool  # on the output layer
    moe: tuple[bool, ...]  # per layer: whether its feed-forward is a mixture of experts
    num_experts: int  # routed; 0 where no layer has any, and so the three that follow
    topk: int
    expert_ffn_size: int
    num_shared_experts: int
    norm_min: float  # least sum that the weights of chosen experts are divided by
    mtp_layers: int  # next-token-prediction layers on disk, which Transformers ignores
    dtype: str  # "bfloat16"

    @property
    def layers(self) -> tuple[int, ...]:
        """Global 0-based layer numbers."""
        return tuple(range(self.num_layers))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Those whose feed-forward is a mixture of experts."""
        return tuple(layer for layer, moe in enumerate(self.moe) if moe)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Every layer attends to all positions."""
        return (None,) * self.num_layers

    @property
    def rope(self) -> tuple[bool, ...]:
        """Every layer rotates."""
        return (True,) * self.num_layers

    @property
    def shared_ffn_size(self) -> int:
        """Width of all shared experts together."""
        return self.expert_ffn_size * self.num_shared_experts

    @property
    def dims(self) -> dict[str, int]:
        """Axis letter -> size (the letters are `schema/param_mapping.py`'s)."""
        experts = {"E": self.num_experts, "M": self.expert_ffn_size, "A": self.shared_ffn_size}
        return dense_dims(self) | experts


def first_pool(config: Mapping[str, Any], field: str) -> Any:
    """The field's value for a model with one pool of experts: of [N], N; of [N, M], N; else as it stands.

    Raises:
        UnsupportedConfig: a list of another length.
    """
    value = config.get(field)
    if not isinstance(value, list | tuple):
        return value
    if len(value) not in (1, 2):
        raise UnsupportedConfig(
            field, got=value, wanted="a number, [N] or [N, M]: a value for each pool of experts"
        )
    return value[0]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Lists reduced to the first pool's value, and a null that Transformers derives from another field, derived."""
    plain = {**config, **{field: first_pool(config, field) for field in LISTED if field in config}}
    # Ernie4_5Config.__post_init__; the other class derives nothing
    if (
        config.get("model_type") == MODEL_TYPES[DENSE]
        and plain.get("num_key_value_heads", ...) is None
    ):
        plain["num_key_value_heads"] = plain.get(
            "num_attention_heads", _DEFAULTS[False]["num_attention_heads"]
        )
    return plain


def read_hf_config(config: Mapping[str, Any]) -> Ernie45ModelConfig:
    """The facts of an ERNIE 4.5 configuration.

    Args:
        config: `config.json` as a mapping, or the Transformers config's `to_dict()`.

    Raises:
        UnsupportedConfig: a field that is malformed, not modelled, or that Transformers cannot run.
    """
    config = _plain(config)
    is_moe = config.get("model_type") == MODEL_TYPES[MOE] or MOE in (
        config.get("architectures") or ()
    )
    default = _DEFAULTS[is_moe]
    heads = read_count(config, "num_attention_heads", default["num_attention_heads"])
    kv_heads = read_count(config, "num_key_value_heads", default["num_key_value_heads"])
    hidden = read_count(config, "hidden_size", default["hidden_size"])
    layers = read_count(config, "num_hidden_layers", default["num_hidden_layers"])
    if is_moe:  # Ernie4_5_MoeAttention.__init__ derives an absent one, and cannot run null
        given = read_count(config, "head_dim") if "head_dim" in config else None
    else:  # Ernie4_5Config derives null, and has a default for an absent one
        given = None if config.get("head_dim", 128) is None else read_count(config, "head_dim", 128)
    check_types(config)
    _, theta, _ = rope_of(config, kinds=("default",), default_theta=500000.0)
    moe = _schedule(config, layers) if is_moe else (False,) * layers
    return Ernie45ModelConfig(
        vocab_size=read_count(config, "vocab_size", 103424),
        hidden_size=hidden,
        ffn_size=read_count(config, "intermediate_size", default["intermediate_size"]),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=check_heads(config, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=given),
        max_positions=read_count(config, "max_position_embeddings", 131072),
        norm_eps=read_number(config, "rms_norm_eps", 1e-5),
        init_std=read_number(config, "initializer_range", 0.02),
        tied=read_flag(config, "tie_word_embeddings", True),
        rope_theta=theta,
        bias=read_flag(config, "use_bias", False),
        head_bias=is_moe
        and read_flag(config, "use_bias", False),  # Ernie4_5ForCausalLM's lm_head never has one
        moe=moe,
        mtp_layers=read_count(config, "num_nextn_predict_layers", 0, least=0),
        dtype=read_dtype(config),
        **(_experts(config) if any(moe) else _NO_EXPERTS),
    )


_NO_EXPERTS = {
    "num_experts": 0,
    "topk": 0,
    "expert_ffn_size": 0,
    "num_shared_experts": 0,
    "norm_min": 0.0,
}


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    count, topk = read_count(config, "moe_num_experts", 64), read_count(config, "moe_k", 6)
    if topk > count:
        raise UnsupportedConfig("moe_k", got=topk, wanted=f"at most moe_num_experts={count}")
    return {
        "num_experts": count,
        "topk": topk,
        "expert_ffn_size": read_count(config, "moe_intermediate_size", 1536),
        "num_shared_experts": read_count(config, "moe_num_shared_experts", 2, least=0),
        "norm_min": read_number(config, "moe_norm_min", 1e-12),
    }


def _schedule(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers are mixtures of experts (Ernie4_5_MoeDecoderLayer.__init__); `mlp_layer_types` wins."""
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        known = ("dense", "sparse")
        if (
            not isinstance(kinds, list | tuple)
            or len(kinds) != layers
            or any(kind not in known for kind in kinds)
        ):
            wanted = f"a list of {known[0]!r} and {known[1]!r}, one for each of num_hidden_layers={layers}"
            raise UnsupportedConfig("mlp_layer_types", got=kinds, wanted=wanted)
        return tuple(kind == "sparse" for kind in kinds)
    start = read_count(config, "moe_layer_start_index", 1, least=0)
    end = read_count(config, "moe_layer_end_index", -1, least=-1)
    interval = read_count(config, "moe_layer_interval", 1)
    last = layers - 1 if end == -1 else end
    return tuple((layer + 1) % interval == 0 and start <= layer <= last for layer in range(layers))


# Facts with one field of their own. Not listed: those a training run may set for itself (see `rewritten`).
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "bias": "use_bias",
    "mtp_layers": "num_nextn_predict_layers",
    "dtype": "dtype",
}
_EXPERT_FIELDS = {
    "num_experts": "moe_num_experts",
    "topk": "moe_k",
    "expert_ffn_size": "moe_intermediate_size",
    "num_shared_experts": "moe_num_shared_experts",
    "norm_min": "moe_norm_min",
}
_TRAINING_FIELDS = {"max_positions": "max_position_embeddings", "init_std": "initializer_range"}


def write_hf_config(model_config: Ernie45ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of these facts, key by key as `source` spells it, changed only where the facts have changed.

    Args:
        facts: of the model to be exported.
        source: the configuration the model was made from; empty for one made by hand.

    Raises:
        UnsupportedConfig: a schedule that ERNIE 4.5's configuration has no words for, or biases on the output layer
            alone.
    """
    architecture = MOE if any(model_config.moe) else DENSE
    config, changed = rewritten(
        model_config,
        source,
        read_hf_config,
        identity={"architectures": [architecture], "model_type": MODEL_TYPES[architecture]},
        fields=_FIELDS | (_EXPERT_FIELDS if any(model_config.moe) else {}),
        training_fields=_TRAINING_FIELDS,
    )
    if "num_layers" in changed and "head_dim" not in config:
        config["head_dim"] = model_config.head_dim
    if changed & {"moe", "num_layers"} and config["model_type"] == MODEL_TYPES[MOE]:
        config |= _write_schedule(model_config.moe)
        if "mlp_layer_types" in config:
            config["mlp_layer_types"] = ["sparse" if moe else "dense" for moe in model_config.moe]
    if "rope_theta" in changed:
        for key in ("rope_theta", "rope_scaling"):
            config.pop(key, None)
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": model_config.rope_theta}
    if source and read_hf_config(config).head_bias != model_config.head_bias:
        raise UnsupportedConfig(
            "head_bias", got=model_config.head_bias, wanted="as use_bias says", where="provider"
        )
    return config


def _write_schedule(moe: tuple[bool, ...]) -> dict[str, int]:
    """Start, end and interval that make these layers mixtures of experts."""
    layers = len(moe)
    sparse = [layer for layer, here in enumerate(moe) if here]
    if not sparse:  # a start behind the last layer
        return {
            "moe_layer_start_index": layers,
            "moe_layer_end_index": layers - 1,
            "moe_layer_interval": 1,
        }
    for interval in range(1, layers + 1):
        fields = {
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": interval,
        }
        if _schedule(fields, layers) == moe:
            return fields
    raise UnsupportedConfig(
        "moe_layer_freq", got=moe, wanted="every n-th layer between two of them", where="provider"
    )
