"""EXAONE 4.0's Hugging Face configuration -> frozen facts. The only reader of it; no torch.

It reads `config.json` as Transformers 4 and 5 write it, and `Exaone4Config.to_dict()`; defaults are those of
`transformers/models/exaone4/configuration_exaone4.py` (5.12.1). What Transformers cannot read or run is refused
here with the remedy, because a model that Transformers cannot run has no logits to be equal to.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.parts.schedule import FULL, SLIDING, layer_types_of, windows_of

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "Exaone4Facts", "Llama3Rope", "read_config", "write_config"]

ARCHITECTURE, MODEL_TYPE = "Exaone4ForCausalLM", "exaone4"

ROPE_TYPES = ("default", "llama3")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope:
    """Llama 3's scaling of RoPE frequencies (`transformers.modeling_rope_utils._compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exaone4Facts:
    """What an EXAONE 4.0 model is, whatever spelling said so. Sizes are counts of elements."""

    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    init_std: float
    attention_dropout: float
    tied: bool
    rope_theta: float
    llama3: Llama3Rope | None  # None: RoPE unscaled
    windows: tuple[int | None, ...]  # per layer: keys a query sees, its own included; None = all
    rope: tuple[bool, ...]  # per layer: whether queries and keys are rotated
    dtype: str  # "bfloat16"

    @property
    def layers(self) -> tuple[int, ...]:
        """Global 0-based layer numbers."""
        return tuple(range(self.num_layers))

    @property
    def dims(self) -> dict[str, int]:
        """Axis letter -> size (the letters are `parts/rows.py`'s)."""
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "F": self.ffn_size,
            "D": self.head_dim,
            "Q": self.num_heads * self.head_dim,
            "K": self.num_kv_heads * self.head_dim,
        }


def read_config(config: Mapping[str, Any]) -> Exaone4Facts:
    """The facts of an EXAONE 4.0 configuration.

    Args:
        config: `config.json` as a mapping, or `Exaone4Config.to_dict()`.

    Raises:
        UnsupportedConfig: a field that is missing, malformed, not modelled, or that Transformers cannot run.
    """
    heads = _count(config, "num_attention_heads", 32)
    kv_heads = _count(config, "num_key_value_heads", 32)
    hidden = _count(config, "hidden_size", 4096)
    layers = _count(config, "num_hidden_layers", 32)
    if heads % kv_heads:
        raise UnsupportedConfig("num_key_value_heads", got=kv_heads, wanted=f"a divisor of num_attention_heads={heads}")
    if config.get("head_dim", 1) is None:
        raise UnsupportedConfig(
            "head_dim",
            got=None,
            wanted="a positive whole number, or absent, because Transformers cannot run null",
            remedy=f"write {hidden // heads}, hidden_size / num_attention_heads, or take it out",
        )
    if "head_dim" not in config and hidden % heads:
        raise UnsupportedConfig(
            "hidden_size",
            got=hidden,
            wanted=f"a multiple of num_attention_heads={heads}",
            remedy="or write head_dim",
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UnsupportedConfig("hidden_act", got=activation, known=("silu",))
    if (
        dtype := str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    ) not in DTYPES:
        raise UnsupportedConfig("dtype", got=dtype, known=DTYPES)

    _check_types(config)
    windows = _windows(config, layers)
    head_dim = _count(config, "head_dim", hidden // heads)
    if head_dim % 2:
        raise UnsupportedConfig("head_dim", got=head_dim, wanted="even, because RoPE rotates pairs")
    theta, llama3 = _rope(config)
    return Exaone4Facts(
        vocab_size=_count(config, "vocab_size", 102400),
        hidden_size=hidden,
        ffn_size=_count(config, "intermediate_size", 16384),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=_count(config, "max_position_embeddings", 2048),
        norm_eps=_number(config, "rms_norm_eps", 1e-5),
        init_std=_number(config, "initializer_range", 0.02),
        attention_dropout=_number(config, "attention_dropout", 0.0),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        llama3=llama3,
        windows=windows,
        # NoPE hangs on `sliding_window`, not on whether any layer slides (Exaone4Attention.forward).
        rope=tuple(_window(config) is None or window is not None for window in windows),
        dtype=dtype,
    )


def _window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window", 4096)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UnsupportedConfig("sliding_window", got=window, wanted="null or a positive whole number of keys")
    return window


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` or, where Transformers reads it too, a whole-number pattern."""
    window = _window(config)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = _kinds_from_pattern(config.get("sliding_window_pattern", 4), window, layers)
    if not isinstance(kinds, list | tuple) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UnsupportedConfig("layer_types", got=kinds, wanted=f"a list of {FULL!r} and {SLIDING!r}")
    if len(kinds) != layers:
        raise UnsupportedConfig(
            "layer_types", got=f"{len(kinds)} entries", wanted=f"one entry for each of num_hidden_layers={layers}"
        )
    if window is None and SLIDING in kinds:
        raise UnsupportedConfig(
            "sliding_window", got=None, wanted="a number of keys, because layer_types has sliding layers"
        )
    return windows_of(kinds, window)


def _kinds_from_pattern(pattern: object, window: int | None, layers: int) -> list[str]:
    # Where Transformers and vLLM read a pattern differently, or Transformers divides by zero, only layer_types is
    # clear.
    if window is None:
        raise UnsupportedConfig(
            "layer_types",
            got=None,
            wanted="written out where sliding_window is null, because Transformers divides by zero there",
            remedy=f'write "layer_types": [{", ".join([f"{FULL!r}"] * min(layers, 2))}, ...], one entry a layer',
        )
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        raise UnsupportedConfig(
            "sliding_window_pattern",
            got=pattern,
            wanted="a positive whole number where layer_types is missing, because Transformers reads nothing else",
            remedy=f'write "layer_types": [{SLIDING!r}, ..., {FULL!r}], one entry a layer, instead',
        )
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    """Theta and scaling: Transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    found = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None]
    rope = found[0] if found else {}
    if found[1:] and found[1] != rope:  # Transformers would take this one
        raise UnsupportedConfig("rope_scaling", got=found[1], wanted=f"absent, or equal to rope_parameters={rope!r}")
    if not isinstance(rope, Mapping):
        raise UnsupportedConfig("rope_parameters", got=rope, wanted="an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedConfig("rope_type", got=kind, known=ROPE_TYPES)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UnsupportedConfig("partial_rotary_factor", got=partial, known=(1.0,))
    theta = _number(rope, "rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    return theta, Llama3Rope(
        factor=_divisor(rope, "factor"),
        low_freq_factor=_divisor(rope, "low_freq_factor"),
        high_freq_factor=_divisor(rope, "high_freq_factor"),
        original_max_positions=_count(rope, "original_max_position_embeddings"),
    )


def _check_types(config: Mapping[str, Any]) -> None:
    """Fields that only travel, but that Transformers 5 refuses to load with another type."""
    for field in ("tie_word_embeddings", "use_cache"):
        if not isinstance(value := config.get(field, False), bool):
            raise UnsupportedConfig(field, got=value, known=(True, False))
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(field)
        numbers = value if field == "eos_token_id" and isinstance(value, list) else [value]
        if any(number is not None and (not isinstance(number, int) or isinstance(number, bool)) for number in numbers):
            raise UnsupportedConfig(field, got=value, wanted="a token's number or null")


def _count(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedConfig(field, got=value, wanted="a positive whole number")
    return value


def _divisor(config: Mapping[str, Any], field: str) -> float:
    if not (value := _number(config, field)):
        raise UnsupportedConfig(field, got=value, wanted="more than zero, because Transformers divides by it")
    return value


def _number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
        raise UnsupportedConfig(field, got=value, wanted="a finite number, zero or more")
    return float(value)


# Facts with one field of their own. Not listed: those a training run may set for itself without changing the model
# (max_positions, which Megatron-Bridge keeps in the training sequence length; init_std; attention_dropout).
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
    "dtype": "dtype",
}
_TRAINING_FIELDS = {
    "max_positions": "max_position_embeddings",
    "init_std": "initializer_range",
    "attention_dropout": "attention_dropout",
}


def write_config(facts: Exaone4Facts, source: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of these facts, key by key as `source` spells it, changed only where the facts have changed.

    Args:
        facts: of the model to be exported.
        source: the configuration the model was made from; empty for one made by hand.

    Raises:
        UnsupportedConfig: a schedule of windows and RoPE that EXAONE 4.0's configuration has no words for.
    """
    config = {key: value for key, value in source.items() if key != "transformers_version"}
    if not source:
        config = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    before = read_config(source) if source else None
    changed = {
        name for name in Exaone4Facts.__dataclass_fields__ if getattr(before, name, None) != getattr(facts, name)
    }
    fields = _FIELDS if source else _FIELDS | _TRAINING_FIELDS
    for name, field in fields.items():
        if name in changed or not source:
            config[field] = getattr(facts, name)
    if "head_dim" not in config and facts.head_dim * facts.num_heads != facts.hidden_size:
        config["head_dim"] = facts.head_dim
    if "dtype" in changed:
        config.pop("torch_dtype", None)
    if not source or changed & {"windows", "rope", "num_layers"}:
        config |= _write_schedule(facts, config.get("sliding_window") or 4096)
    if not source or changed & {"rope_theta", "llama3"}:
        for key in ("rope_theta", "rope_scaling"):
            config.pop(key, None)
        config["rope_parameters"] = _write_rope(facts)
    return config


def _write_schedule(facts: Exaone4Facts, default_window: int) -> dict[str, Any]:
    windows = {window for window in facts.windows if window is not None}
    if len(windows) > 1:
        raise UnsupportedConfig(
            "window_size", got=sorted(windows), wanted="one window for all sliding layers", where="provider"
        )
    window = next(iter(windows)) if windows else None if all(facts.rope) else default_window
    if facts.rope != tuple(window is None or here is not None for here in facts.windows):
        raise UnsupportedConfig(
            "no_rope_freq",
            got=facts.rope,
            wanted="RoPE on every layer, or on exactly the sliding ones",
            where="provider",
            remedy="EXAONE 4.0's configuration cannot say anything else",
        )
    return {"layer_types": layer_types_of(facts.windows), "sliding_window": window}


def _write_rope(facts: Exaone4Facts) -> dict[str, Any]:
    if facts.llama3 is None:
        return {"rope_type": "default", "rope_theta": facts.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": facts.rope_theta,
        "factor": facts.llama3.factor,
        "low_freq_factor": facts.llama3.low_freq_factor,
        "high_freq_factor": facts.llama3.high_freq_factor,
        "original_max_position_embeddings": facts.llama3.original_max_positions,
    }
