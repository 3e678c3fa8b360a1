"""Tiny models of the published EXAONE 4.0 topologies, which run every branch within a second.

Sizes are uneven on purpose: head_dim is not hidden / heads, the vocabulary is odd, epsilon and RoPE
are not the defaults, and the window is shorter than a prompt.
"""

from __future__ import annotations

from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.layer_schedule import FULL, SLIDING

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "TINY"]

_COMMON: JSONObject = {
    "architectures": ["Exaone4ForCausalLM"],
    "model_type": "exaone4",
    "vocab_size": 387,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 3e-4,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
    "dtype": "float32",
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}

TINY: dict[str, JSONObject] = {
    # EXAONE-4.0-32B: untied, three sliding-window layers to one full-attention layer without RoPE
    "exaone4": _COMMON
    | {
        "num_hidden_layers": 8,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 2,
        "sliding_window": 8,
        "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False,
    },
    # EXAONE-4.0-1.2B: tied, every layer global with RoPE
    "exaone4-1.2b": _COMMON
    | {
        "num_hidden_layers": 6,
        "layer_types": [FULL] * 6,
        "sliding_window": None,
        "sliding_window_pattern": 0,  # Transformers' value for null
        "tie_word_embeddings": True,
    },
}

SPECIAL_TOKENS = {
    "[PAD]": 0,
    "[BOS]": 1,
    "[|system|]": 357,
    "[|user|]": 358,
    "[|assistant|]": 359,
    "[|tool|]": 360,
    "[|endofturn|]": 361,
}

CHAT_TEMPLATE = """\
{%- if tools %}[|system|]
# Available Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}[|endofturn|]
{% endif %}
{%- for message in messages %}[|{{ message.role }}|]
{{ message.content }}[|endofturn|]
{% endfor %}
{%- if add_generation_prompt %}[|assistant|]
{%- if enable_thinking is defined and enable_thinking %}
<think>
{%- else %}
<think>

</think>

{% endif %}
{%- endif %}"""
