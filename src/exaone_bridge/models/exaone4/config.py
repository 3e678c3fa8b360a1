"""EXAONE 4.0's config.json <-> model config. No torch.

It reads config.json as Transformers 4 and 5 write it, and `Exaone4Config.to_dict()`. A config that
Transformers cannot read or run is rejected with the remedy, because such a model has no logits to
compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.head_config import read_head, write_head
from exaone_bridge.schema.hf_config import (
    check_types,
    non_negative_float,
    positive_float,
    positive_int,
    read_head_dim,
    read_rope,
    update_hf_config,
)
from exaone_bridge.schema.hf_field import ConfigPart, hf_field
from exaone_bridge.schema.hf_spelling import write_rope
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.layer_schedule import (
    FULL,
    SLIDING,
    layer_types_of,
    window_pattern,
    windows_of,
)
from exaone_bridge.schema.model_config import ModelConfig

__all__ = [
    "ARCHITECTURE",
    "MODEL_TYPE",
    "Exaone4ModelConfig",
    "Llama3Rope",
    "read_hf_config",
    "write_hf_config",
]

ARCHITECTURE, MODEL_TYPE = "Exaone4ForCausalLM", "exaone4"

# What Transformers takes where config.json has no such key
# (transformers/models/exaone4/configuration_exaone4.py, 5.12.1).
_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Rope(ConfigPart):
    """Llama 3's scaling of RoPE frequencies.

    The formula is Transformers' `modeling_rope_utils._compute_llama3_parameters` (5.12.1).
    """

    factor: float = hf_field("factor", read=positive_float, provider="rope_scaling_factor")
    low_freq_factor: float = hf_field(
        "low_freq_factor", read=positive_float, provider="rope_scaling_low_freq_factor"
    )
    high_freq_factor: float = hf_field(
        "high_freq_factor", read=positive_float, provider="rope_scaling_high_freq_factor"
    )
    original_max_positions: int = hf_field(
        "original_max_position_embeddings",
        read=positive_int,
        provider="rope_scaling_original_max_position_embeddings",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Exaone4ModelConfig(ModelConfig):
    """An EXAONE 4.0 model.

    Attributes:
        llama3: scaling of the RoPE frequencies; None: they are not scaled.
    """

    attention_dropout: float = hf_field(
        "attention_dropout", read=non_negative_float, provider="attention_dropout", training=True
    )
    llama3: Llama3Rope | None
    windows: tuple[int | None, ...] = hf_field()
    rope: tuple[bool, ...] = hf_field()


def read_hf_config(hf_config: JSONMapping) -> Exaone4ModelConfig:
    """Read an EXAONE 4.0 config.

    Args:
        hf_config: config.json as a mapping, or `Exaone4Config.to_dict()`.

    Raises:
        UnsupportedConfig: a field that is missing, malformed or not supported, or that Transformers
            cannot run.
    """
    hf_config = {**_DEFAULTS, **hf_config}
    values = Exaone4ModelConfig.values_from_hf(hf_config)
    head_dim = read_head_dim(hf_config)
    check_types(hf_config)
    windows = _windows(hf_config, values["num_layers"])
    rope = read_rope(hf_config, known=("default", "llama3"))
    head = read_head(hf_config)
    values["tied"] &= head is None  # there is no output layer to be tied
    return Exaone4ModelConfig(
        **values,
        head_dim=head_dim,
        rope_theta=rope.theta,
        llama3=(
            Llama3Rope(**Llama3Rope.values_from_hf(rope.fields)) if rope.kind == "llama3" else None
        ),
        windows=windows,
        head=head,
        # Whether full-attention layers are without RoPE depends on `sliding_window` alone, even if
        # no layer uses the window (Exaone4Attention.forward, 5.12.1).
        rope=tuple(_window(hf_config) is None or window is not None for window in windows),
    )


def _window(hf_config: JSONMapping) -> int | None:
    window = hf_config["sliding_window"]
    if window is not None and (
        not isinstance(window, int) or isinstance(window, bool) or window < 1
    ):
        raise UnsupportedConfig(
            "sliding_window", got=window, wanted="null or a positive whole number of keys"
        )
    return window


def _windows(hf_config: JSONMapping, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window, from `layer_types` or a pattern that is a whole number."""
    window = _window(hf_config)
    kinds = hf_config.get("layer_types")
    if kinds is None:
        kinds = _kinds_from_pattern(hf_config["sliding_window_pattern"], window, num_layers)
    if not isinstance(kinds, list | tuple) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UnsupportedConfig(
            "layer_types", got=kinds, wanted=f"a list of {FULL!r} and {SLIDING!r}"
        )
    if len(kinds) != num_layers:
        raise UnsupportedConfig(
            "layer_types",
            got=f"{len(kinds)} entries",
            wanted=f"one entry for each of num_hidden_layers={num_layers}",
        )
    if window is None and SLIDING in kinds:
        raise UnsupportedConfig(
            "sliding_window",
            got=None,
            wanted="a number of keys, because layer_types has sliding layers",
        )
    return windows_of(kinds, window)


def _kinds_from_pattern(pattern: object, window: int | None, num_layers: int) -> list[str]:
    # Only layer_types is unambiguous where Transformers and vLLM read a pattern differently, or
    # where Transformers divides by zero.
    if window is None:
        entries = ", ".join([f"{FULL!r}"] * min(num_layers, 2))
        raise UnsupportedConfig(
            "layer_types",
            got=None,
            wanted="present where sliding_window is null, because Transformers divides by zero "
            "there",
            remedy=f'write "layer_types": [{entries}, ...], with one entry for each layer',
        )
    if not isinstance(pattern, int) or isinstance(pattern, bool) or pattern < 1:
        raise UnsupportedConfig(
            "sliding_window_pattern",
            got=pattern,
            wanted="a positive whole number where layer_types is missing, because Transformers "
            "reads nothing else",
            remedy=f'write "layer_types": [{SLIDING!r}, ..., {FULL!r}], with one entry for each '
            "layer, instead",
        )
    return [SLIDING if (layer + 1) % pattern else FULL for layer in range(num_layers)]


def write_hf_config(model_config: Exaone4ModelConfig, source: JSONMapping) -> JSONObject:
    """Write config.json: `source` with the fields that differ in this model config.

    Args:
        model_config: of the model to be exported.
        source: the config.json that the model came from; empty for a model made without one.

    Raises:
        UnsupportedConfig: windows and RoPE that an EXAONE 4.0 config cannot express.
    """
    hf_config, before = update_hf_config(
        model_config,
        source,
        read_hf_config,
        identity={"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE},
    )
    changed = model_config.changed_from(before)
    if model_config.head is not None:
        hf_config |= write_head(model_config.head, None if before is None else before.head)
    if changed & {"windows", "rope", "num_layers"}:
        hf_config |= _write_schedule(model_config, hf_config.get("sliding_window") or 4096)
        if before is None or "sliding_window_pattern" in hf_config:  # SGLang and mlx-lm read it
            hf_config["sliding_window_pattern"] = window_pattern(model_config.windows)
    if changed & {"rope_theta", "llama3"}:
        llama3 = model_config.llama3
        write_rope(
            hf_config,
            kind="default" if llama3 is None else "llama3",
            theta=model_config.rope_theta,
            fields=None if llama3 is None else llama3.hf_values(),
        )
    return hf_config


def _write_schedule(model_config: Exaone4ModelConfig, default_window: int) -> JSONObject:
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
        window is None or layer_window is not None for layer_window in model_config.windows
    ):
        raise UnsupportedConfig(
            "no_rope_freq",
            got=model_config.rope,
            wanted="RoPE on every layer, or on exactly the sliding ones",
            where="provider",
            remedy="EXAONE 4.0's config cannot express anything else",
        )
    return {"layer_types": layer_types_of(model_config.windows), "sliding_window": window}
