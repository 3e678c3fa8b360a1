"""The Hugging Face configs of the recipes: published config.json files, and tiny ones. No torch.

Recipes work offline. A recipe that is given a directory reads the config there instead.
"""

from __future__ import annotations

from exaone_bridge.models.ernie45.tiny import TINY as ERNIE45_TINY
from exaone_bridge.models.exaone4.tiny import TINY as EXAONE4_TINY
from exaone_bridge.models.exaone45.tiny import TINY as EXAONE45_TINY
from exaone_bridge.models.exaone_moe.tiny import TINY as EXAONE_MOE_TINY
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.layer_schedule import FULL, SLIDING

__all__ = ["CONFIGS"]

_EXAONE4: JSONObject = {
    "architectures": ["Exaone4ForCausalLM"],
    "model_type": "exaone4",
    "vocab_size": 102400,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 361,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_EXAONE4_32B: JSONObject = {
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 16,
}
_ERNIE45: JSONObject = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "vocab_size": 103424,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "use_cache": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_ERNIE45_EXPERTS: JSONObject = {
    "moe_num_experts": 64,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_K_EXAONE: JSONObject = {
    "architectures": ["ExaoneMoeForCausalLM"],
    "model_type": "exaone_moe",
    "vocab_size": 153600,
    "hidden_size": 6144,
    "intermediate_size": 18432,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "use_cache": True,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 53,
    "pad_token_id": 0,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "scoring_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
# Sizes that Transformer Engine's kernels support (head_dim 64, multiples of 16), and a vocabulary
# that is large enough for real text.
_TINY: JSONObject = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "dtype": "bfloat16",
}

CONFIGS: dict[str, JSONObject] = {
    "exaone4_1p2b": _EXAONE4
    | {
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "sliding_window_pattern": 0,  # as Transformers reads null
        "layer_types": [FULL] * 30,
    },
    "exaone4_32b": _EXAONE4 | _EXAONE4_32B,
    # Without the multi-token prediction of the published checkpoint: a recipe that starts from
    # random weights has no passthrough tensors.
    "exaone45_33b": {
        "architectures": ["Exaone4_5_ForConditionalGeneration"],
        "model_type": "exaone4_5",
        "image_token_id": 67,
        "video_token_id": 68,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "text_config": {
            field: value for field, value in _EXAONE4.items() if field != "architectures"
        }
        | _EXAONE4_32B
        | {"vocab_size": 153600, "max_position_embeddings": 262144},
        "vision_config": {
            "model_type": "exaone4_5_vision",
            "depth": 28,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "hidden_act": "silu",
            "num_heads": 32,
            "num_key_value_heads": 8,
            "in_channels": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "out_hidden_size": 5120,
            "fullatt_block_indexes": [6, 13, 20, 27],
            "dtype": "bfloat16",
        },
    },
    "ernie45_0p3b": _ERNIE45
    | {
        "architectures": ["Ernie4_5ForCausalLM"],
        "model_type": "ernie4_5",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Without the multi-token prediction layer of the published checkpoint, which Transformers
    # ignores: a recipe that starts from random weights has no passthrough tensors.
    "ernie45_21b_a3b": _ERNIE45
    | _ERNIE45_EXPERTS
    | {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 27,
        "tie_word_embeddings": True,
    },
    "ernie45_300b_a47b": _ERNIE45
    | _ERNIE45_EXPERTS
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 54,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "moe_k": 8,
        "moe_num_shared_experts": 0,
        "moe_intermediate_size": 3584,
        "moe_layer_start_index": 3,
        "moe_layer_end_index": 53,
        "tie_word_embeddings": False,
    },
    # Without the multi-token prediction of the published checkpoint, as above.
    "k_exaone_236b_a23b": _K_EXAONE
    | {
        "num_hidden_layers": 48,
        "num_experts": 128,
        "layer_types": [SLIDING, SLIDING, SLIDING, FULL] * 12,
        "sliding_window": 128,
        "sliding_window_pattern": "LLLG",
        "sliding_windows": [128, 128, 128, 0] * 12,
        "first_k_dense_replace": 1,
        "mlp_layer_types": ["dense"] + ["sparse"] * 47,
        "is_moe_layer": [False] + [True] * 47,
    },
    # K-EXAONE 2.0: the sizes follow from the published number of tensors and bytes. The order of
    # full and sliding-window layers, and the clamp's limits, are not published in text: a run
    # starts from a checkpoint's own config.json (`hf_path`).
    "k_exaone_2_750b_a37b": _K_EXAONE
    | {
        "num_hidden_layers": 78,
        "num_experts": 256,
        "layer_types": [FULL, SLIDING] + [SLIDING, SLIDING, SLIDING, FULL] * 19,
        "sliding_windows": [0, 4096] + [128, 128, 128, 0] * 19,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 76,
        "swiglu_limits": [0.0] * 62 + [7.0] * 16,
        "topk_method": "noaux_tc",
    },
    # The vision encoder's patch sizes are the tiny model's, which those of its processor match.
    "exaone45_vl_tiny": EXAONE45_TINY["exaone45"]
    | {
        "dtype": "bfloat16",
        "text_config": EXAONE45_TINY["exaone45"]["text_config"]
        | _TINY
        | {"sliding_window": 64, "num_nextn_predict_layers": 0},
        "vision_config": EXAONE45_TINY["exaone45"]["vision_config"]
        | {"hidden_size": 64, "out_hidden_size": _TINY["hidden_size"], "dtype": "bfloat16"},
    },
    "exaone4_tiny": EXAONE4_TINY["exaone4"] | _TINY | {"sliding_window": 64},
    "ernie45_tiny": ERNIE45_TINY["ernie45"]
    | _TINY
    | {"moe_intermediate_size": 128, "num_nextn_predict_layers": 0},
    "k_exaone_tiny": EXAONE_MOE_TINY["exaone-moe"]
    | _TINY
    | {
        "moe_intermediate_size": 128,
        "sliding_window": 64,
        "sliding_windows": [64, 64, 64, 0],
        "num_nextn_predict_layers": 0,
    },
}
# The same model; its recipes train on conversations with images.
CONFIGS["exaone45_vl_33b"] = CONFIGS["exaone45_33b"]
