"""Tiny EXAONE MoE models: the published topologies at sizes that run in a second.

Sizes are small and uneven on purpose: head_dim is not hidden_size / heads, the vocabulary is not
divisible by two, epsilon and theta are not the defaults, and the windows are shorter than a prompt.
Expert sizes are multiples of 8, which Transformers' grouped_mm needs in bf16.
"""

from __future__ import annotations

from exaone_bridge.models.exaone_moe.config import ARCHITECTURES, MODEL_TYPE
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.layer_schedule import FULL, SLIDING

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "TINY"]

_COMMON: JSONObject = {
    "architectures": [ARCHITECTURES[0]],
    "model_type": MODEL_TYPE,
    "vocab_size": 387,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 3e-4,
    "attention_dropout": 0.0,
    "use_cache": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
    "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL],
    "scoring_func": "sigmoid",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "mtp_layer_types": [FULL],
    "mtp_sliding_windows": [0],
}

TINY: dict[str, JSONObject] = {
    # K-EXAONE-236B-A23B: a dense first layer, windows of one size
    "exaone-moe": _COMMON
    | {
        "sliding_window": 5,
        "sliding_window_pattern": "LLLG",
        "sliding_windows": [5, 5, 5, 0],
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "is_moe_layer": [False, True, True, True],
    },
    # K-EXAONE-2.0-750B-A37B: two dense layers, windows of two sizes, a clamp on the last layers
    "exaone-moe-2": _COMMON
    | {
        "num_hidden_layers": 6,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING, SLIDING, FULL],
        "sliding_windows": [0, 9, 5, 5, 5, 0],
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
        "swiglu_limits": [0.0, 0.5, 0.0, 0.5, 0.5, 0.5],
        "topk_method": "noaux_tc",
        "mtp_num_speculative_steps": 4,
    },
}

SPECIAL_TOKENS = {
    "[PAD]": 0,
    "[BOS]": 1,
    "[UNK]": 3,
    "<|endofturn|>": 53,
    "<think>": 54,
    "</think>": 55,
    "<|system|>": 56,
    "<|user|>": 57,
    "<|assistant|>": 58,
}

# Thinking is on unless `enable_thinking` is false, the other way round than EXAONE 4.0's.
CHAT_TEMPLATE = """\
{%- for message in messages %}<|{{ message.role }}|>
{{ message.content }}<|endofturn|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
<think>
{%- if enable_thinking is defined and not enable_thinking %}

</think>

{% else %}
{% endif %}
{%- endif %}"""
