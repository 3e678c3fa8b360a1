"""Tiny models of the published ERNIE 4.5 topologies, which run every branch within a second.

Sizes are uneven on purpose: head_dim is not hidden / heads, the vocabulary is odd, epsilon and
theta are not the defaults.
"""

from __future__ import annotations

from exaone_bridge.models.ernie45.config import DENSE, MODEL_TYPES, MOE
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "TINY"]

_COMMON: JSONObject = {
    "architectures": [MOE],
    "model_type": MODEL_TYPES[MOE],
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
    "use_cache": True,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
_EXPERTS: JSONObject = {
    "moe_norm_min": 1e-12,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

TINY: dict[str, JSONObject] = {
    # ERNIE-4.5-21B-A3B: tied, a dense layer and then experts, two of them shared, multi-token
    # prediction on disk
    "ernie45": _COMMON
    | _EXPERTS
    | {
        "moe_num_experts": 8,
        "moe_intermediate_size": 40,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
        "moe_layer_interval": 1,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": True,
    },
    # ERNIE-4.5-300B-A47B: untied, three dense layers and then experts, none shared; here on every
    # second layer
    "ernie45-300b": _COMMON
    | _EXPERTS
    | {
        "num_hidden_layers": 8,
        "moe_num_experts": 8,
        "moe_intermediate_size": 56,
        "moe_k": 2,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3,
        "moe_layer_end_index": 7,
        "moe_layer_interval": 2,
        "tie_word_embeddings": False,
    },
    # ERNIE-4.5-0.3B: dense, tied
    "ernie45-dense": _COMMON
    | {
        "architectures": [DENSE],
        "model_type": MODEL_TYPES[DENSE],
        "tie_word_embeddings": True,
    },
}

SPECIAL_TOKENS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|begin_of_sentence|>": 3,
    "<|end_of_sentence|>": 4,
}

CHAT_TEMPLATE = """\
{{- "<|begin_of_sentence|>" }}
{%- for message in messages %}
{%- if message.role == "user" %}User: {{ message.content }}
{% elif message.role == "assistant" %}Assistant: {{ message.content }}<|end_of_sentence|>
{%- else %}{{ message.content }}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}Assistant: {% endif %}"""
