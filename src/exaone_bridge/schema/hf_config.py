"""What every family's reader and writer of a Hugging Face configuration share. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.dtypes import MODEL_DTYPES

__all__ = [
    "check_heads",
    "check_types",
    "language_config",
    "read_count",
    "read_divisor",
    "read_dtype",
    "read_flag",
    "read_number",
    "rewritten",
    "rope_of",
]


def read_count(
    config: Mapping[str, Any], field: str, default: int | None = None, *, least: int = 1
) -> int:
    """A whole number of at least `least`.

    Raises:
        UnsupportedConfig: it is something else, or missing without a default.
    """
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive whole number" if least == 1 else f"a whole number, {least} or more"
        raise UnsupportedConfig(field, got=value, wanted=wanted)
    return value


def read_number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    """A finite number, zero or more.

    Raises:
        UnsupportedConfig: it is something else, or missing without a default.
    """
    value = config.get(field, default)
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not 0 <= value <= sys.float_info.max
    ):
        raise UnsupportedConfig(field, got=value, wanted="a finite number, zero or more")
    return float(value)


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model: of a model with other towers, what is nested for it."""
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def read_flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    """A switch.

    Raises:
        UnsupportedConfig: it is something else than true or false.
    """
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise UnsupportedConfig(field, got=value, known=(True, False))
    return value


def read_divisor(config: Mapping[str, Any], field: str) -> float:
    """A finite number above zero.

    Raises:
        UnsupportedConfig: it is something else, or missing.
    """
    if not (value := read_number(config, field)):
        raise UnsupportedConfig(
            field, got=value, wanted="more than zero, because Transformers divides by it"
        )
    return value


def check_types(config: Mapping[str, Any]) -> None:
    """Refuse types that Transformers 5 does not load, in fields that only travel.

    Raises:
        UnsupportedConfig: a switch that is no bool, or a token id that is no number.
    """
    for field in ("tie_word_embeddings", "use_cache"):
        if not isinstance(value := config.get(field, False), bool):
            raise UnsupportedConfig(field, got=value, known=(True, False))
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(field)
        numbers = value if field == "eos_token_id" and isinstance(value, list) else [value]
        if any(
            number is not None and (not isinstance(number, int) or isinstance(number, bool))
            for number in numbers
        ):
            raise UnsupportedConfig(field, got=value, wanted="a token's number or null")


def read_dtype(config: Mapping[str, Any]) -> str:
    """`bfloat16`, from `dtype` (Transformers 5) or `torch_dtype` (4).

    Raises:
        UnsupportedConfig: a type that no checkpoint of ours has.
    """
    field, given = _first(config, "dtype", "torch_dtype")
    if given is None:
        return "float32"
    dtype = str(given).removeprefix("torch.")  # "bfloat16", or torch.bfloat16 itself
    if dtype not in MODEL_DTYPES:
        raise UnsupportedConfig(field, got=given, known=MODEL_DTYPES)
    return dtype


def _first(config: Mapping[str, Any], *fields: str) -> tuple[str, Any]:
    """The first of these fields that the file has, and its value; null is as good as absent."""
    return next(
        ((field, config[field]) for field in fields if config.get(field) is not None),
        (fields[0], None),
    )


def check_heads(
    config: Mapping[str, Any], *, hidden: int, heads: int, kv_heads: int, head_dim: int | None
) -> int:
    """The width of a head: `head_dim`, or hidden / heads where the configuration has none.

    Raises:
        UnsupportedConfig: heads that do not divide, an unsupported activation, or a head that RoPE cannot rotate.
    """
    if heads % kv_heads:
        raise UnsupportedConfig(
            "num_key_value_heads", got=kv_heads, wanted=f"a divisor of num_attention_heads={heads}"
        )
    if head_dim is None and hidden % heads:
        raise UnsupportedConfig(
            "hidden_size",
            got=hidden,
            wanted=f"a multiple of num_attention_heads={heads}",
            remedy="or write head_dim",
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedConfig("hidden_act", got=activation, known=("silu",))
    width = hidden // heads if head_dim is None else head_dim
    if width % 2:
        raise UnsupportedConfig("head_dim", got=width, wanted="even, because RoPE rotates pairs")
    return width


def rope_of(
    config: Mapping[str, Any], *, kinds: tuple[str, ...], default_theta: float
) -> tuple[str, float, Mapping[str, Any]]:
    """Type, theta and the other fields: Transformers 5 keeps all in `rope_parameters`, 4 in `rope_theta` and
    `rope_scaling`.

    Raises:
        UnsupportedConfig: a type outside `kinds`, or RoPE on a part of the head only.
    """
    field, rope = _first(config, "rope_parameters", "rope_scaling")
    other = config.get("rope_scaling")
    if other is not None and other != rope:  # Transformers would take this one
        raise UnsupportedConfig(
            "rope_scaling", got=other, wanted=f"absent, or equal to rope_parameters={rope!r}"
        )
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        raise UnsupportedConfig(field, got=rope, wanted="an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise UnsupportedConfig("rope_type", got=kind, known=kinds)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedConfig("partial_rotary_factor", got=partial, known=(1.0,))
    return kind, read_number(rope, "rope_theta", config.get("rope_theta", default_theta)), rope


def rewritten(
    model_config: Any,
    source: Mapping[str, Any],
    read_hf_config: Callable[[Mapping[str, Any]], Any],
    *,
    identity: Mapping[str, Any],
    fields: Mapping[str, str],
    training_fields: Mapping[str, str],
) -> tuple[dict[str, Any], set[str]]:
    """`source`, with the fields of changed facts rewritten, and the names of the facts that changed.

    Args:
        facts: a family's, of the model to be exported.
        source: the configuration the model was made from; empty for one made by hand: then every fact has changed.
        identity: `architectures` and `model_type` where there is no source.
        fields: fact -> field, for facts with a field of their own.
        training_fields: likewise, for facts that a training run may set for itself without changing the model:
            written only where there is no source.
    """
    names = set(type(model_config).__dataclass_fields__)
    if not source:
        written = {
            field: getattr(model_config, name)
            for name, field in {**fields, **training_fields}.items()
        }
        return {**identity, **written}, names
    config = {key: value for key, value in source.items() if key != "transformers_version"}
    before = read_hf_config(source)
    changed = {name for name in names if getattr(before, name) != getattr(model_config, name)}
    config |= {
        field: getattr(model_config, name) for name, field in fields.items() if name in changed
    }
    if "dtype" in changed:
        config.pop("torch_dtype", None)
    return config, changed
