"""EXAONE 4.5's config.json <-> model config. No torch.

config.json has two more configs: `text_config`, which is an EXAONE 4.0's and is read as such, and
`vision_config`. Transformers builds no multi-token prediction; its fields are in `text_config`, as
in the published config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.config import MODEL_TYPE as TEXT_MODEL_TYPE
from exaone_bridge.models.exaone4.config import Exaone4ModelConfig
from exaone_bridge.models.exaone4.config import read_hf_config as read_text
from exaone_bridge.models.exaone4.config import write_hf_config as write_text
from exaone_bridge.schema.hf_config import boolean, check_types, read_dtype, read_int
from exaone_bridge.schema.hf_field import hf_field
from exaone_bridge.schema.hf_spelling import write_dtype
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_config import MTPConfig, VisionConfig

__all__ = [
    "ARCHITECTURE",
    "MODEL_TYPE",
    "Exaone45ModelConfig",
    "read_hf_config",
    "write_hf_config",
]

ARCHITECTURE, MODEL_TYPE = "Exaone4_5_ForConditionalGeneration", "exaone4_5"
TEXT, VISION = "text_config", "vision_config"
_TEXT_TYPES = (TEXT_MODEL_TYPE, "exaone4_5_text")  # the second is the first release's name
_VISION_TYPE = "exaone4_5_vision"

# What Transformers takes where config.json has no such key
# (transformers/models/exaone4_5/configuration_exaone4_5.py, 5.12.1).
_DEFAULTS = {"tie_word_embeddings": False, "image_token_id": 67, "video_token_id": 68}
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "num_key_value_heads": 8,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_MTP_DEPTH = "num_nextn_predict_layers"
_MTP_DEFAULTS = {_MTP_DEPTH: 0, "mtp_share_layers": False, "mtp_loss_scaling_factor": 0.1}


def _token_id(hf_config: JSONMapping, key: str) -> int:
    return read_int(hf_config, key, least=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exaone45ModelConfig(Exaone4ModelConfig):
    """An EXAONE 4.5 model: an EXAONE 4.0 language model, its vision encoder, and MTP.

    `tied` is the full model's; `text_config` may differ, and Transformers ignores it there.

    Attributes:
        image_token_id, video_token_id: the placeholder tokens of image and video features.
    """

    image_token_id: int = hf_field("image_token_id", read=_token_id, provider="image_token_id")
    video_token_id: int = hf_field("video_token_id", read=_token_id, provider="video_token_id")
    vision: VisionConfig

    @property
    def text(self) -> Exaone4ModelConfig:
        """The language model alone."""
        values = {
            each.name: getattr(self, each.name) for each in dataclasses.fields(Exaone4ModelConfig)
        }
        return Exaone4ModelConfig(**values | {"vision": None, "mtp": None})


# The fields of the full model, which are not in `text_config`.
_TOP_LEVEL = ("tie_word_embeddings", "image_token_id", "video_token_id")


def read_hf_config(hf_config: JSONMapping) -> Exaone45ModelConfig:
    """Read an EXAONE 4.5 config.

    Args:
        hf_config: config.json as a mapping, or `Exaone4_5_Config.to_dict()`.

    Raises:
        UnsupportedConfig: a field that is missing, malformed or not supported, or that Transformers
            cannot run.
    """
    text = _nested(hf_config, TEXT, _TEXT_TYPES)
    vision = _nested(hf_config, VISION, (_VISION_TYPE,))
    hf_config = {**_DEFAULTS, **hf_config}
    check_types(hf_config)
    dtype = _dtype(hf_config, text, vision)
    language_model = read_text({**text, "dtype": dtype})
    vision_config = _read_vision({**_VISION_DEFAULTS, **vision})
    if vision_config.out_size != language_model.hidden_size:
        raise UnsupportedConfig(
            "vision_config.out_hidden_size",
            got=vision_config.out_size,
            wanted=f"text_config.hidden_size={language_model.hidden_size}, because image features "
            "take the place of token embeddings",
        )
    image, video = _token_id(hf_config, "image_token_id"), _token_id(hf_config, "video_token_id")
    for key, token_id in (("image_token_id", image), ("video_token_id", video)):
        if token_id >= language_model.vocab_size:
            wanted = f"less than vocab_size={language_model.vocab_size}"
            raise UnsupportedConfig(key, got=token_id, wanted=wanted)
    if image == video:
        raise UnsupportedConfig(
            "video_token_id", got=video, wanted="another token than image_token_id"
        )
    values = {
        each.name: getattr(language_model, each.name)
        for each in dataclasses.fields(Exaone4ModelConfig)
    }
    return Exaone45ModelConfig(
        **values
        | {
            "tied": boolean(hf_config, "tie_word_embeddings"),
            "vision": vision_config,
            "image_token_id": image,
            "video_token_id": video,
            "mtp": _read_mtp({**_MTP_DEFAULTS, **text}),
        }
    )


def _nested(hf_config: JSONMapping, key: str, model_types: tuple[str, ...]) -> JSONMapping:
    nested = hf_config.get(key)
    if nested is None:  # Transformers takes the class's defaults
        nested = {}
    if not isinstance(nested, Mapping):
        raise UnsupportedConfig(key, got=nested, wanted="an object")
    if (model_type := nested.get("model_type", model_types[0])) not in model_types:
        raise UnsupportedConfig(f"{key}.model_type", got=model_type, known=model_types)
    return nested


def _dtype(hf_config: JSONMapping, *nested: JSONMapping) -> str:
    """Return the dtype of the full model; Transformers writes it in each of the three objects."""
    given = [
        each
        for each in (hf_config, *nested)
        if any(each.get(key) is not None for key in ("dtype", "torch_dtype"))
    ]
    found = [read_dtype(each) for each in given or [hf_config]]
    if len(set(found)) > 1:
        raise UnsupportedConfig(
            "dtype", got=found, wanted="one dtype for the full model, its vision encoder included"
        )
    return found[0]


def _read_mtp(text: JSONMapping) -> MTPConfig | None:
    depth = 0 if text[_MTP_DEPTH] is None else read_int(text, _MTP_DEPTH, least=0)
    mtp = MTPConfig(depth=depth, **MTPConfig.values_from_hf(text))
    return mtp if depth else None


def _read_vision(vision: JSONMapping) -> VisionConfig:
    values = VisionConfig.values_from_hf(vision)
    heads, kv_heads, hidden = values["num_heads"], values["num_kv_heads"], values["hidden_size"]
    if heads % kv_heads:
        raise UnsupportedConfig(
            "vision_config.num_key_value_heads", got=kv_heads, wanted=f"a divisor of {heads} heads"
        )
    if hidden % heads or hidden // heads % 4:
        wanted = (
            f"num_heads={heads} times a multiple of four, because RoPE rotates pairs "
            "in rows and in columns"
        )
        raise UnsupportedConfig("vision_config.hidden_size", got=hidden, wanted=wanted)
    if (activation := vision.get("hidden_act", "silu")) != "silu":
        raise UnsupportedConfig("vision_config.hidden_act", got=activation, known=("silu",))
    # Transformers writes this field since 5.17, and had its values as constants before.
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_theta", 1e4) != 1e4 or rope.get("rope_type", "axial") != "axial":
        wanted = "rope_type 'axial' and rope_theta 10000"
        raise UnsupportedConfig("vision_config.rope_parameters", got=rope, wanted=wanted)
    blocks = vision["fullatt_block_indexes"]
    if not isinstance(blocks, list | tuple) or any(type(block) is not int for block in blocks):
        raise UnsupportedConfig(
            "vision_config.fullatt_block_indexes", got=blocks, wanted="a list of block numbers"
        )
    token_side = values["patch_size"] * values["merge_size"]
    if (window := values["window_size"]) < token_side:
        wanted = f"at least patch_size x spatial_merge_size = {token_side}, the side of one token"
        raise UnsupportedConfig("vision_config.window_size", got=window, wanted=wanted)
    return VisionConfig(**values, full_attention=tuple(blocks))


def write_hf_config(model_config: Exaone45ModelConfig, source: JSONMapping) -> JSONObject:
    """Write config.json: `source` with the fields that differ in this model config.

    Args:
        model_config: of the model to be exported.
        source: the config.json that the model came from; empty for a model made without one.

    Raises:
        UnsupportedConfig: windows and RoPE that an EXAONE 4.0 config cannot express.
    """
    if not source:
        return _write_without_source(model_config)
    before = read_hf_config(source)
    hf_config = dict(source)
    text, vision = dict(hf_config.get(TEXT) or {}), dict(hf_config.get(VISION) or {})
    if before.text != model_config.text:  # `tied` and the dtype are the full model's, see below
        nested = read_text(text)
        language_model = dataclasses.replace(
            model_config.text, tied=nested.tied, dtype=nested.dtype
        )
        text = write_text(language_model, text)
    if model_config.mtp is not None:
        text |= model_config.mtp.hf_values(before.mtp)
    elif before.mtp is not None:
        text[_MTP_DEPTH] = 0
    vision |= model_config.vision.hf_values(before.vision)
    changed = model_config.hf_values(before)
    hf_config |= {key: changed[key] for key in _TOP_LEVEL if key in changed}
    if before.dtype != model_config.dtype:
        objects = (hf_config, text, vision)
        stated = [each for each in objects if {"dtype", "torch_dtype"} & each.keys()]
        for each in stated or [hf_config]:
            write_dtype(each, model_config.dtype)
    return hf_config | {key: each for key, each in ((TEXT, text), (VISION, vision)) if each}


def _write_without_source(model_config: Exaone45ModelConfig) -> JSONObject:
    text = write_text(model_config.text, {})
    del text["architectures"]
    if model_config.mtp is not None:
        text |= model_config.mtp.hf_values()
    values = model_config.hf_values()
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), model_config.dtype)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **dtypes,
        **{key: values[key] for key in _TOP_LEVEL},
        TEXT: text,
        VISION: {
            "model_type": _VISION_TYPE,
            **dtypes,
            **model_config.vision.hf_values(),
        },
    }
