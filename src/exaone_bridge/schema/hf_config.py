"""Readers of a Hugging Face config, and its writer. No torch.

The readers take an object of config.json and a key. They raise UnsupportedConfig for a value that
Transformers cannot read or run, or that is not supported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.dtypes import MODEL_DTYPES
from exaone_bridge.schema.hf_spelling import write_dtype
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

if TYPE_CHECKING:
    from exaone_bridge.schema.model_config import ModelConfig

__all__ = [
    "Rope",
    "boolean",
    "check_types",
    "language_config",
    "non_negative_float",
    "positive_float",
    "positive_int",
    "read_dtype",
    "read_head_dim",
    "read_int",
    "read_rope",
    "update_hf_config",
    "with_num_layers",
]


def read_int(hf_config: JSONMapping, key: str, *, least: int) -> int:
    """Return a whole number of at least `least`.

    Raises:
        UnsupportedConfig: the value is something else or missing.
    """
    value = hf_config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive whole number" if least == 1 else f"a whole number, {least} or more"
        raise UnsupportedConfig(key, got=value, wanted=wanted)
    return value


def positive_int(hf_config: JSONMapping, key: str) -> int:
    """Return a whole number of at least 1.

    Raises:
        UnsupportedConfig: the value is something else or missing.
    """
    return read_int(hf_config, key, least=1)


def non_negative_float(hf_config: JSONMapping, key: str) -> float:
    """Return a finite number, zero or more.

    Raises:
        UnsupportedConfig: the value is something else or missing.
    """
    value = hf_config.get(key)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 <= value <= sys.float_info.max
    ):
        raise UnsupportedConfig(key, got=value, wanted="a finite number, zero or more")
    return float(value)


def positive_float(hf_config: JSONMapping, key: str) -> float:
    """Return a finite number above zero.

    Raises:
        UnsupportedConfig: the value is something else or missing.
    """
    if not (value := non_negative_float(hf_config, key)):
        raise UnsupportedConfig(key, got=value, wanted="a finite number above zero")
    return value


def boolean(hf_config: JSONMapping, key: str) -> bool:
    """Return true or false.

    Raises:
        UnsupportedConfig: the value is something else or missing.
    """
    value = hf_config.get(key)
    if not isinstance(value, bool):
        raise UnsupportedConfig(key, got=value, known=(True, False))
    return value


def read_dtype(hf_config: JSONMapping, key: str = "dtype") -> str:
    """Return the model's dtype ("bfloat16") from `dtype` (Transformers 5) or `torch_dtype` (4).

    Raises:
        UnsupportedConfig: a type that no supported checkpoint has.
    """
    key, value = _first(hf_config, key, f"torch_{key}")
    if value is None:
        return "float32"
    dtype = str(value).removeprefix("torch.")  # "bfloat16", or torch.bfloat16 itself
    if dtype not in MODEL_DTYPES:
        raise UnsupportedConfig(key, got=value, known=MODEL_DTYPES)
    return dtype


def _first(hf_config: JSONMapping, *keys: str) -> tuple[str, Any]:
    """Return the first of these keys whose value is not null, and the value."""
    return next(
        ((key, hf_config[key]) for key in keys if hf_config.get(key) is not None), (keys[0], None)
    )


def language_config(hf_config: JSONObject) -> JSONObject:
    """Return the object that describes the language model: `text_config` where there is one."""
    nested = hf_config.get("text_config")
    return nested if isinstance(nested, dict) else hf_config


def with_num_layers(
    hf_config: JSONMapping, layers: int, *, keep: Collection[str] = ()
) -> JSONObject:
    """Return the config of a language model with another number of layers.

    Every list with one entry for each layer is repeated or truncated.

    Args:
        hf_config: a config with a valid number of layers.
        layers: the new number of layers.
        keep: lists that stay as they are.
    """
    before = hf_config["num_hidden_layers"]
    lists = {
        key: (value * max(1, layers))[: max(0, layers)]
        for key, value in hf_config.items()
        if isinstance(value, list) and len(value) == before and key not in keep
    }
    return {**hf_config, **lists, "num_hidden_layers": layers}


def check_types(hf_config: JSONMapping) -> None:
    """Check the types of fields that are kept as they are, as strictly as Transformers 5 does.

    Raises:
        UnsupportedConfig: `use_cache` is not a boolean, or a token id is not a number.
    """
    if not isinstance(value := hf_config.get("use_cache", False), bool):
        raise UnsupportedConfig("use_cache", got=value, known=(True, False))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = hf_config.get(key)
        token_ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if any(
            token_id is not None and (not isinstance(token_id, int) or isinstance(token_id, bool))
            for token_id in token_ids
        ):
            raise UnsupportedConfig(key, got=value, wanted="a token id or null")


def read_head_dim(hf_config: JSONMapping, *, null_is_derived: bool = False) -> int:
    """Return the size of an attention head, and check what follows from the number of heads.

    An absent `head_dim` is hidden_size / num_attention_heads.

    Args:
        hf_config: with `hidden_size`, `num_attention_heads` and `num_key_value_heads` checked.
        null_is_derived: Transformers' class reads null as an absent `head_dim`.

    Raises:
        UnsupportedConfig: null that Transformers cannot run, head counts that do not divide, an
            activation other than SiLU, or a head size that RoPE cannot be applied to.
    """
    hidden_size, num_heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    head_dim = None
    if hf_config.get("head_dim") is not None:
        head_dim = positive_int(hf_config, "head_dim")
    elif "head_dim" in hf_config and not null_is_derived:
        raise UnsupportedConfig(
            "head_dim",
            got=None,
            wanted="a positive whole number, or absent, because Transformers cannot run null",
            remedy=f"write {hidden_size // num_heads}, hidden_size / num_attention_heads, or take "
            "it out",
        )
    if num_heads % (num_kv_heads := hf_config["num_key_value_heads"]):
        raise UnsupportedConfig(
            "num_key_value_heads",
            got=num_kv_heads,
            wanted=f"a divisor of num_attention_heads={num_heads}",
        )
    if head_dim is None and hidden_size % num_heads:
        raise UnsupportedConfig(
            "hidden_size",
            got=hidden_size,
            wanted=f"a multiple of num_attention_heads={num_heads}",
            remedy="or write head_dim",
        )
    if (activation := hf_config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedConfig("hidden_act", got=activation, known=("silu",))
    size = hidden_size // num_heads if head_dim is None else head_dim
    if size % 2:
        raise UnsupportedConfig("head_dim", got=size, wanted="even, because RoPE rotates pairs")
    return size


@dataclass(frozen=True, slots=True)
class Rope:
    """The RoPE parameters of a config.

    Attributes:
        kind: Transformers' `rope_type`.
        theta: the base.
        fields: the object of config.json with the parameters of this kind.
    """

    kind: str
    theta: float
    fields: JSONMapping


def read_rope(hf_config: JSONMapping, *, known: tuple[str, ...]) -> Rope:
    """Read `rope_parameters` (Transformers 5), or `rope_theta` and `rope_scaling` (4).

    Args:
        hf_config: with the class's default `rope_theta`.
        known: the kinds that the family supports.

    Raises:
        UnsupportedConfig: another kind, or RoPE on a part of the head only.
    """
    key, fields = _first(hf_config, "rope_parameters", "rope_scaling")
    other = hf_config.get("rope_scaling")
    default = {"rope_theta": hf_config.get("rope_theta")}
    # Transformers takes rope_scaling where both are there, and completes it with rope_theta.
    if other is not None and _same_rope(other, default) != _same_rope(fields, default):
        raise UnsupportedConfig(
            "rope_scaling",
            got=other,
            wanted=f"absent, or equal to rope_parameters={fields!r} with "
            f"rope_theta={default['rope_theta']!r}",
        )
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise UnsupportedConfig(key, got=fields, wanted="an object")
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in known:
        raise UnsupportedConfig("rope_type", got=kind, known=known)
    partial = fields.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedConfig("partial_rotary_factor", got=partial, known=(1.0,))
    theta = non_negative_float({"rope_theta": hf_config.get("rope_theta"), **fields}, "rope_theta")
    return Rope(kind, theta, fields)


def _same_rope(fields: object, default: JSONMapping) -> object:
    """Return RoPE parameters with one spelling of the kind, and with a base."""
    if not isinstance(fields, Mapping):
        return fields
    kind = fields.get("rope_type", fields.get("type", "default"))
    return {**default, **fields, "rope_type": kind, "type": kind}


def update_hf_config[C: ModelConfig](
    model_config: C,
    source: JSONMapping,
    read_hf_config: Callable[[JSONMapping], C],
    *,
    identity: JSONMapping,
) -> tuple[JSONObject, C | None]:
    """Write the fields of a model config that `hf_field` gives a key, and keep everything else.

    Args:
        model_config: of the model to be exported.
        source: the config.json that the model came from; empty for a model made without one.
        read_hf_config: the family's reader.
        identity: `architectures` and `model_type`, written where there is no source.

    Returns:
        config.json, and what `source` describes (None if empty).
    """
    if not source:
        dtypes = dict.fromkeys(("dtype", "torch_dtype"), model_config.dtype)
        return {**identity, **model_config.hf_values(), **dtypes}, None
    before = read_hf_config(source)
    hf_config, changed = dict(source), model_config.hf_values(before)
    if changed.pop("dtype", None) is not None:
        write_dtype(hf_config, model_config.dtype)
    hf_config |= changed
    sizes_changed = model_config.changed_from(before) & {"hidden_size", "num_heads"}
    if sizes_changed and hf_config.get("head_dim") is None:  # it would be derived from them
        hf_config["head_dim"] = model_config.head_dim
    return hf_config, before
