"""EXAONE 4.0's Hugging Face configuration -> frozen facts. The only reader of it; no torch.

It reads `config.json` as Transformers 4 and 5 write it, and `Exaone4Config.to_dict()`; defaults are those of
`transformers/models/exaone4/configuration_exaone4.py` (5.12.1). What Transformers cannot read or run is refused
here with the remedy, because a model that Transformers cannot run has no logits to be equal to.
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
    read_divisor,
    read_dtype,
    read_number,
    rewritten,
    rope_of,
)
from exaone_bridge.schema.layer_schedule import FULL, SLIDING, layer_types_of, windows_of
from exaone_bridge.schema.model_family import dense_dims

__all__ = [
    "ARCHITECTURE",
    "MODEL_TYPE",
    "Exaone4ModelConfig",
    "Llama3Rope",
    "read_hf_config",
    "write_hf_config",
]

ARCHITECTURE, MODEL_TYPE = "Exaone4ForCausalLM", "exaone4"

ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope:
    """Llama 3's scaling of RoPE frequencies (`transformers.modeling_rope_utils._compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exaone4ModelConfig:
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
        """Axis letter -> size (the letters are `schema/param_mapping.py`'s)."""
        return dense_dims(self)


def read_hf_config(config: Mapping[str, Any]) -> Exaone4ModelConfig:
    """The facts of an EXAONE 4.0 configuration.

    Args:
        config: `config.json` as a mapping, or `Exaone4Config.to_dict()`.

    Raises:
        UnsupportedConfig: a field that is missing, malformed, not modelled, or that Transformers cannot run.
    """
    heads = read_count(config, "num_attention_heads", 32)
    kv_heads = read_count(config, "num_key_value_heads", 32)
    hidden = read_count(config, "hidden_size", 4096)
    layers = read_count(config, "num_hidden_layers", 32)
    if config.get("head_dim", 1) is None:
        raise UnsupportedConfig(
            "head_dim",
            got=None,
            wanted="a positive whole number, or absent, because Transformers cannot run null",
            remedy=f"write {hidden // heads}, hidden_size / num_attention_heads, or take it out",
        )
    given = read_count(config, "head_dim") if "head_dim" in config else None
    head_dim = check_heads(config, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=given)
    dtype = read_dtype(config)
    check_types(config)
    windows = _windows(config, layers)
    theta, llama3 = _rope(config)
    return Exaone4ModelConfig(
        vocab_size=read_count(config, "vocab_size", 102400),
        hidden_size=hidden,
        ffn_size=read_count(config, "intermediate_size", 16384),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=read_count(config, "max_position_embeddings", 2048),
        norm_eps=read_number(config, "rms_norm_eps", 1e-5),
        init_std=read_number(config, "initializer_range", 0.02),
        attention_dropout=read_number(config, "attention_dropout", 0.0),
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
    if window is not None and (
        not isinstance(window, int) or isinstance(window, bool) or window < 1
    ):
        raise UnsupportedConfig(
            "sliding_window", got=window, wanted="null or a positive whole number of keys"
        )
    return window


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` or, where Transformers reads it too, a whole-number pattern."""
    window = _window(config)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = _kinds_from_pattern(config.get("sliding_window_pattern", 4), window, layers)
    if not isinstance(kinds, list | tuple) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UnsupportedConfig(
            "layer_types", got=kinds, wanted=f"a list of {FULL!r} and {SLIDING!r}"
        )
    if len(kinds) != layers:
        raise UnsupportedConfig(
            "layer_types",
            got=f"{len(kinds)} entries",
            wanted=f"one entry for each of num_hidden_layers={layers}",
        )
    if window is None and SLIDING in kinds:
        raise UnsupportedConfig(
            "sliding_window",
            got=None,
            wanted="a number of keys, because layer_types has sliding layers",
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
    kind, theta, rope = rope_of(config, kinds=ROPE_TYPES, default_theta=10000.0)
    if kind == "default":
        return theta, None
    return theta, Llama3Rope(
        factor=read_divisor(rope, "factor"),
        low_freq_factor=read_divisor(rope, "low_freq_factor"),
        high_freq_factor=read_divisor(rope, "high_freq_factor"),
        original_max_positions=read_count(rope, "original_max_position_embeddings"),
    )


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


def write_hf_config(model_config: Exaone4ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of these facts, key by key as `source` spells it, changed only where the facts have changed.

    Args:
        facts: of the model to be exported.
        source: the configuration the model was made from; empty for one made by hand.

    Raises:
        UnsupportedConfig: a schedule of windows and RoPE that EXAONE 4.0's configuration has no words for.
    """
    config, changed = rewritten(
        model_config,
        source,
        read_hf_config,
        identity={"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE},
        fields=_FIELDS,
        training_fields=_TRAINING_FIELDS,
    )
    if (
        "head_dim" not in config
        and model_config.head_dim * model_config.num_heads != model_config.hidden_size
    ):
        config["head_dim"] = model_config.head_dim
    if changed & {"windows", "rope", "num_layers"}:
        config |= _write_schedule(model_config, config.get("sliding_window") or 4096)
    if changed & {"rope_theta", "llama3"}:
        for key in ("rope_theta", "rope_scaling"):
            config.pop(key, None)
        config["rope_parameters"] = _write_rope(model_config)
    return config


def _write_schedule(model_config: Exaone4ModelConfig, default_window: int) -> dict[str, Any]:
    windows = {window for window in model_config.windows if window is not None}
    if len(windows) > 1:
        raise UnsupportedConfig(
            "window_size",
            got=sorted(windows),
            wanted="one window for all sliding layers",
            where="provider",
        )
    window = next(iter(windows)) if windows else None if all(model_config.rope) else default_window
    if model_config.rope != tuple(
        window is None or here is not None for here in model_config.windows
    ):
        raise UnsupportedConfig(
            "no_rope_freq",
            got=model_config.rope,
            wanted="RoPE on every layer, or on exactly the sliding ones",
            where="provider",
            remedy="EXAONE 4.0's configuration cannot say anything else",
        )
    return {"layer_types": layer_types_of(model_config.windows), "sliding_window": window}


def _write_rope(model_config: Exaone4ModelConfig) -> dict[str, Any]:
    if model_config.llama3 is None:
        return {"rope_type": "default", "rope_theta": model_config.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": model_config.rope_theta,
        "factor": model_config.llama3.factor,
        "low_freq_factor": model_config.llama3.low_freq_factor,
        "high_freq_factor": model_config.llama3.high_freq_factor,
        "original_max_position_embeddings": model_config.llama3.original_max_positions,
    }
