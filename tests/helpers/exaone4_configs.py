"""EXAONE 4.0 configs: the published ones of both Transformers versions, and random valid ones."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

from exaone_bridge.models.exaone4.config import Exaone4ModelConfig, Llama3Rope

L, G = "sliding_attention", "full_attention"
VERSIONS = ("transformers-4", "transformers-5")  # each names some keys of config.json otherwise

# Field of the model config -> its key in config.json, and a value that no published model has.
PLAIN_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 153600),
    "hidden_size": ("hidden_size", 640),
    "ffn_size": ("intermediate_size", 96),
    "num_heads": ("num_attention_heads", 80),
    "num_kv_heads": ("num_key_value_heads", 2),
    "head_dim": ("head_dim", 6),
    "norm_eps": ("rms_norm_eps", 3e-4),
    "tied": ("tie_word_embeddings", ...),  # the other of the two values
}
# A training run may change these: an export keeps the source's values.
TRAINING_FIELDS: dict[str, tuple[str, Any]] = {
    "max_positions": ("max_position_embeddings", 77),
    "init_std": ("initializer_range", 0.5),
    "attention_dropout": ("attention_dropout", 0.25),
}
LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_COMMON: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "exaone4",
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "transformers_version": "4.54.0.dev0",
    "use_cache": True,
    "vocab_size": 102400,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "1.2B": _COMMON
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "layer_types": [G] * 30,
        "max_position_embeddings": 65536,
        "num_attention_heads": 32,
        "num_hidden_layers": 30,
        "sliding_window": None,
        "sliding_window_pattern": None,
        "tie_word_embeddings": True,
    },
    "32B": _COMMON
    | {
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "layer_types": [L, L, L, G] * 16,
        "max_position_embeddings": 131072,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False,
    },
}
_MODEL_CONFIG: dict[str, Any] = {
    "vocab_size": 102400,
    "num_kv_heads": 8,
    "norm_eps": 1e-5,
    "init_std": 0.02,
    "attention_dropout": 0.0,
    "rope_theta": 1e6,
    "llama3": Llama3Rope(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
    "dtype": "bfloat16",
}
PUBLISHED_MODEL_CONFIGS = {
    "1.2B": Exaone4ModelConfig(
        hidden_size=2048,
        ffn_size=4096,
        num_layers=30,
        num_heads=32,
        head_dim=64,
        max_positions=65536,
        tied=True,
        windows=(None,) * 30,
        rope=(True,) * 30,
        **_MODEL_CONFIG,
    ),
    "32B": Exaone4ModelConfig(
        hidden_size=5120,
        ffn_size=27392,
        num_layers=64,
        num_heads=40,
        head_dim=128,
        max_positions=131072,
        tied=False,
        windows=(4096, 4096, 4096, None) * 16,
        rope=(True, True, True, False) * 16,
        **_MODEL_CONFIG,
    ),
}


def published(name: str, version: str) -> dict[str, Any]:
    """Returns a published config.json as this version writes it, with one unknown key."""
    config = copy.deepcopy(PUBLISHED[name]) | {"x_note": {"kept": [1, None]}}
    if version == "transformers-4":
        return config | {
            "rope_scaling": dict(_LLAMA3),
            "rope_theta": 1000000,
            "torch_dtype": "bfloat16",
        }
    return config | {"rope_parameters": _LLAMA3 | {"rope_theta": 1000000.0}, "dtype": "bfloat16"}


def small(**changes: Any) -> dict[str, Any]:
    """Returns a small valid hybrid config with these keys changed; `...` removes a key."""
    config: dict[str, Any] = {
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": [L, G, L],
        "sliding_window": 5,
        "sliding_window_pattern": "LG",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    } | changes
    return {key: value for key, value in config.items() if value is not ...}


_positive = st.integers(1, 300)
_fraction = st.floats(0.0, 0.5)
_dtypes = st.sampled_from(["float32", "bfloat16", "float16"])
_frequencies = st.floats(1.0, 64.0)


@st.composite
def _ropes(draw: st.DrawFn) -> dict[str, Any]:
    """Draws the RoPE keys of either version of Transformers, or none of them."""
    theta = draw(st.one_of(st.floats(1.0, 1e7), st.integers(1, 10**7)))
    scaled = {
        draw(st.sampled_from(["rope_type", "type"])): "llama3",
        "factor": draw(_frequencies),
        "low_freq_factor": draw(_frequencies),
        "high_freq_factor": draw(_frequencies),
        "original_max_position_embeddings": draw(_positive),
    }
    unscaled = draw(st.sampled_from([{}, {"rope_type": "default"}, {"type": "default"}]))
    body = draw(st.sampled_from([scaled, unscaled]))
    partial = draw(st.sampled_from([{}, {"partial_rotary_factor": 1.0}]))
    return draw(
        st.sampled_from(
            [
                {},
                {"rope_theta": theta},
                {"rope_theta": theta, "rope_scaling": None},
                {"rope_theta": theta, "rope_scaling": body | partial},
                {"rope_scaling": body},
                {"rope_theta": theta, "rope_parameters": body},
                {"rope_parameters": body | partial | {"rope_theta": theta}},
                {"rope_parameters": body | {"rope_theta": theta}, "rope_theta": 77.0},
                {"rope_parameters": None},
            ]
        )
    )


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draws configs that Transformers reads and runs, with each key present or absent."""
    config: dict[str, Any] = {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4"}

    def maybe(field: str, values: st.SearchStrategy[Any]) -> None:
        if draw(st.booleans()):
            config[field] = draw(values)

    maybe("num_attention_heads", st.integers(1, 12))
    heads = config.get("num_attention_heads", 32)
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    if 32 not in divisors or draw(st.booleans()):
        config["num_key_value_heads"] = draw(st.sampled_from(divisors))
    if draw(st.booleans()):
        config["head_dim"] = 2 * draw(st.integers(1, 70))
        maybe("hidden_size", _positive)
    elif 4096 % (2 * heads) or draw(st.booleans()):
        config["hidden_size"] = 2 * heads * draw(st.integers(1, 9))

    maybe("num_hidden_layers", st.integers(1, 9))
    layers = config.get("num_hidden_layers", 32)
    maybe("sliding_window", st.none() | _positive)
    window = config.get("sliding_window", 4096)
    kinds = st.sampled_from([L, G] if window is not None else [G])
    if window is None or draw(st.booleans()):
        config["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
        maybe("sliding_window_pattern", st.sampled_from([None, "LLLG", "LG", 2, 4]))
    else:
        maybe("sliding_window_pattern", st.integers(1, 10))

    for field in ("vocab_size", "intermediate_size", "max_position_embeddings"):
        maybe(field, _positive)
    for field in ("rms_norm_eps", "initializer_range", "attention_dropout"):
        maybe(field, _fraction)
    maybe("tie_word_embeddings", st.booleans())
    maybe("hidden_act", st.just("silu"))
    maybe("dtype", st.none() | _dtypes)
    maybe("torch_dtype", _dtypes)
    maybe("bos_token_id", _positive)
    maybe("transformers_version", st.just("4.54.0"))
    maybe("x_note", st.just({"kept": [1, None]}))
    return config | draw(_ropes())


@st.composite
def model_config(draw: st.DrawFn) -> Exaone4ModelConfig:
    """Draws the config of any model that an EXAONE 4.0 config can express."""
    layers, kv_heads = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    window = draw(st.none() | _positive)
    sliding = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    windows = tuple(window if is_sliding else None for is_sliding in sliding)
    nope_on_full = window is not None  # with a window, even if no layer uses it
    llama3 = st.builds(
        Llama3Rope,
        factor=_frequencies,
        low_freq_factor=_frequencies,
        high_freq_factor=_frequencies,
        original_max_positions=_positive,
    )
    return Exaone4ModelConfig(
        vocab_size=draw(_positive),
        hidden_size=draw(_positive),
        ffn_size=draw(_positive),
        num_layers=layers,
        num_heads=kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 70)),
        max_positions=draw(_positive),
        norm_eps=draw(_fraction),
        init_std=draw(_fraction),
        attention_dropout=draw(_fraction),
        tied=draw(st.booleans()),
        rope_theta=draw(st.floats(1.0, 1e7)),
        llama3=draw(st.none() | llama3),
        windows=windows,
        rope=tuple(here is not None or not nope_on_full for here in windows),
        dtype=draw(_dtypes),
    )
