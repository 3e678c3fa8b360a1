"""A tiny model of the published EXAONE 4.5 topology.

Its language model is the tiny 32B's; its vision encoder has both kinds of attention, fewer KV heads
than query heads, a window of three tokens, and a hidden size other than the language model's.
"""

from __future__ import annotations

from exaone_bridge.models.exaone4.tiny import CHAT_TEMPLATE as TEXT_TEMPLATE
from exaone_bridge.models.exaone4.tiny import SPECIAL_TOKENS as TEXT_TOKENS
from exaone_bridge.models.exaone4.tiny import TINY as TEXT_TINY
from exaone_bridge.models.exaone45.config import ARCHITECTURE, MODEL_TYPE
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "TINY", "processor_files"]

_TEXT: JSONObject = {
    **{field: value for field, value in TEXT_TINY["exaone4"].items() if field != "architectures"},
    "num_nextn_predict_layers": 1,
    "mtp_share_layers": True,
    "mtp_loss_scaling_factor": 0.1,
}

TINY: dict[str, JSONObject] = {
    "exaone45": {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "image_token_id": 67,
        "video_token_id": 68,
        "vision_start_token_id": 73,
        "vision_end_token_id": 74,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "text_config": _TEXT,
        "vision_config": {
            "model_type": "exaone4_5_vision",
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 56,
            "hidden_act": "silu",
            "num_heads": 4,
            "num_key_value_heads": 2,
            "in_channels": 3,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 24,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
            "initializer_range": 0.02,
            "dtype": "float32",
        },
    }
}

# The tokenizer's placeholder tokens, and the tokens around them (Transformers 5.12.1,
# `processing_exaone4_5.py`).
SPECIAL_TOKENS = TEXT_TOKENS | {
    "<|image_pad|>": 67,
    "<|video_pad|>": 68,
    "<vision>": 73,
    "</vision>": 74,
}

# The content of a message is text, or a list of parts. Each image and video becomes one placeholder
# token, which the processor repeats.
CHAT_TEMPLATE = TEXT_TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<vision><|image_pad|></vision>"
    "{% elif part.type == 'video' %}<vision><|video_pad|></vision>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}",
)

# transformers 5.12.1, Exaone4_5_VisionConfig
_DEFAULTS = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}


def processor_files(config: JSONMapping) -> dict[str, JSONObject]:
    """Return the files of a processor whose patches are those of the config's vision encoder."""
    vision = _DEFAULTS | config["vision_config"]
    merged_patch = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2  # pixels
    processor: JSONObject = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "min_pixels": merged_patch,
        "max_pixels": 64 * merged_patch,
    }
    return {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **processor},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            **processor,
        },
        "processor_config.json": {"processor_class": "Exaone4_5_Processor"},
    }
