"""EXAONE 4.5's Hugging Face configuration -> frozen facts. The only reader of it; no torch.

`config.json` holds two more: `text_config`, which is an EXAONE 4.0's and is read as such, and `vision_config`. Defaults
are those of `transformers/models/exaone4_5/configuration_exaone4_5.py` (5.12.1). Transformers builds no multi-token
prediction; its fields stand in `text_config`, as the published configuration has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.config import MODEL_TYPE as TEXT_MODEL_TYPE
from exaone_bridge.models.exaone4.config import Exaone4ModelConfig
from exaone_bridge.models.exaone4.config import read_hf_config as read_text
from exaone_bridge.models.exaone4.config import write_hf_config as write_text
from exaone_bridge.schema.hf_config import (
    check_types,
    read_count,
    read_dtype,
    read_flag,
    read_number,
)

__all__ = [
    "ARCHITECTURE",
    "MODEL_TYPE",
    "Exaone45ModelConfig",
    "VisionConfig",
    "read_hf_config",
    "write_hf_config",
]

ARCHITECTURE, MODEL_TYPE = "Exaone4_5_ForConditionalGeneration", "exaone4_5"
TEXT, VISION = "text_config", "vision_config"
_TEXT_TYPES = (TEXT_MODEL_TYPE, "exaone4_5_text")  # the second is how the first release spelled it
_VISION_TYPE = "exaone4_5_vision"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """What a vision tower is. Sizes are counts of elements; image sizes are in pixels."""

    depth: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    channels: int
    patch_size: int
    temporal_patch_size: int  # frames
    merge_size: int  # patches along each side of the square that becomes one word
    window_size: int  # pixels
    out_size: int  # the language model's hidden size
    full_attention: tuple[
        int, ...
    ]  # blocks whose patches see their whole image; the others see their window

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused projection: queries, then keys, then values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def patch_elements(self) -> int:
        """Numbers of one patch, of all its frames and channels."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Exaone45ModelConfig(Exaone4ModelConfig):
    """An EXAONE 4.0 language model, the tower before it, and what stands beside it.

    `tied` is the whole model's; `text_config` may say otherwise, and Transformers does not look there.
    """

    vision: VisionConfig
    image_token: int  # the word that holds an image feature's place
    video_token: int
    mtp_depth: int  # words that multi-token prediction looks further ahead; 0: there is none
    mtp_shared: bool  # one layer serves every depth
    mtp_loss_scale: float

    @property
    def text(self) -> Exaone4ModelConfig:
        """The language model alone."""
        return Exaone4ModelConfig(
            **{field.name: getattr(self, field.name) for field in fields(Exaone4ModelConfig)}
        )

    @property
    def mtp_layers(self) -> int:
        """Layers of multi-token prediction on disk."""
        return min(self.mtp_depth, 1) if self.mtp_shared else self.mtp_depth

    @property
    def dims(self) -> dict[str, int]:
        """Axis letter -> size: `schema/param_mapping.py`'s, and the tower's in lower case (`weights.py`)."""
        vision = self.vision
        return self.text.dims | {
            "J": 2 * self.hidden_size,
            "c": vision.channels,
            "t": vision.temporal_patch_size,
            "p": vision.patch_size,
            "v": vision.hidden_size,
            "q": vision.qkv_size,
            "f": vision.ffn_size,
            "m": vision.hidden_size * vision.merge_size**2,
            "o": vision.out_size,
        }


def read_hf_config(config: Mapping[str, Any]) -> Exaone45ModelConfig:
    """The facts of an EXAONE 4.5 configuration.

    Args:
        config: `config.json` as a mapping, or `Exaone4_5_Config.to_dict()`.

    Raises:
        UnsupportedConfig: a field that is missing, malformed, not modelled, or that Transformers cannot run.
    """
    text = _nested(config, TEXT, _TEXT_TYPES)
    vision = _nested(config, VISION, (_VISION_TYPE,))
    check_types(config)
    dtype = _dtype(config, text, vision)
    model_config = read_text({**text, "dtype": dtype})
    vision_encoder = _read_vision(vision)
    if vision_encoder.out_size != model_config.hidden_size:
        raise UnsupportedConfig(
            "vision_config.out_hidden_size",
            got=vision_encoder.out_size,
            wanted=f"text_config.hidden_size={model_config.hidden_size}, because features take the place of words",
        )
    image, video = (
        _word(config, field, default, model_config.vocab_size) for field, default in _TOKENS
    )
    if image == video:
        raise UnsupportedConfig(
            "video_token_id", got=video, wanted="another word than image_token_id"
        )
    return Exaone45ModelConfig(
        **{
            field.name: getattr(model_config, field.name)
            for field in fields(Exaone4ModelConfig)
            if field.name != "tied"
        },
        tied=bool(config.get("tie_word_embeddings", False)),
        vision=vision_encoder,
        image_token=image,
        video_token=video,
        mtp_depth=0 if text.get(_MTP_DEPTH) is None else read_count(text, _MTP_DEPTH, least=0),
        mtp_shared=read_flag(text, "mtp_share_layers", False),
        mtp_loss_scale=read_number(text, "mtp_loss_scaling_factor", 0.1),
    )


_TOKENS = (("image_token_id", 67), ("video_token_id", 68))
_MTP_DEPTH = "num_nextn_predict_layers"


def _word(config: Mapping[str, Any], field: str, default: int, vocab_size: int) -> int:
    number = read_count(config, field, default, least=0)
    if number >= vocab_size:
        raise UnsupportedConfig(field, got=number, wanted=f"less than vocab_size={vocab_size}")
    return number


def _nested(
    config: Mapping[str, Any], field: str, model_types: tuple[str, ...]
) -> Mapping[str, Any]:
    nested = config.get(field)
    if nested is None:  # Transformers takes the class's defaults
        nested = {}
    if not isinstance(nested, Mapping):
        raise UnsupportedConfig(field, got=nested, wanted="an object")
    if (model_type := nested.get("model_type", model_types[0])) not in model_types:
        raise UnsupportedConfig(f"{field}.model_type", got=model_type, known=model_types)
    return nested


def _dtype(config: Mapping[str, Any], *nested: Mapping[str, Any]) -> str:
    """One type for the whole model: Transformers writes it in each of the three."""
    said = [
        each
        for each in (config, *nested)
        if any(each.get(name) is not None for name in ("dtype", "torch_dtype"))
    ]
    found = [read_dtype(each) for each in said or [config]]
    if len(set(found)) > 1:
        raise UnsupportedConfig(
            "dtype", got=found, wanted="one type for the whole model, its towers included"
        )
    return found[0]


def _read_vision(vision: Mapping[str, Any]) -> VisionConfig:
    heads, hidden = read_count(vision, "num_heads", 16), read_count(vision, "hidden_size", 3584)
    kv_heads = read_count(vision, "num_key_value_heads", 8)
    if heads % kv_heads:
        raise UnsupportedConfig(
            "vision_config.num_key_value_heads", got=kv_heads, wanted=f"a divisor of {heads} heads"
        )
    if hidden % heads or hidden // heads % 4:
        wanted = f"num_heads={heads} times a multiple of four, because RoPE rotates pairs in rows and in columns"
        raise UnsupportedConfig("vision_config.hidden_size", got=hidden, wanted=wanted)
    if (activation := vision.get("hidden_act", "silu")) != "silu":
        raise UnsupportedConfig("vision_config.hidden_act", got=activation, known=("silu",))
    depth = read_count(vision, "depth", 32)
    blocks = vision.get("fullatt_block_indexes", (7, 15, 23, 31))
    if not isinstance(blocks, list | tuple) or any(type(block) is not int for block in blocks):
        raise UnsupportedConfig(
            "vision_config.fullatt_block_indexes", got=blocks, wanted="a list of blocks' numbers"
        )
    patch, merge = read_count(vision, "patch_size", 14), read_count(vision, "spatial_merge_size", 2)
    window = read_count(vision, "window_size", 112)
    if window < patch * merge:
        wanted = f"at least patch_size x spatial_merge_size = {patch * merge}, one word"
        raise UnsupportedConfig("vision_config.window_size", got=window, wanted=wanted)
    return VisionConfig(
        depth=depth,
        hidden_size=hidden,
        ffn_size=read_count(vision, "intermediate_size", 3420),
        num_heads=heads,
        num_kv_heads=kv_heads,
        channels=read_count(vision, "in_channels", 3),
        patch_size=patch,
        temporal_patch_size=read_count(vision, "temporal_patch_size", 2),
        merge_size=merge,
        window_size=window,
        out_size=read_count(vision, "out_hidden_size", 3584),
        full_attention=tuple(blocks),
    )


_VISION_FIELDS = {
    "depth": "depth",
    "hidden_size": "hidden_size",
    "ffn_size": "intermediate_size",
    "num_heads": "num_heads",
    "num_kv_heads": "num_key_value_heads",
    "channels": "in_channels",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "out_size": "out_hidden_size",
    "full_attention": "fullatt_block_indexes",
}


def write_hf_config(model_config: Exaone45ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of these facts, key by key as `source` spells it, changed only where the facts have changed.

    Args:
        facts: of the model to be exported.
        source: the configuration the model was made from; empty for one made by hand.

    Raises:
        UnsupportedConfig: what EXAONE 4.0's configuration has no words for.
    """
    if not source:
        return _written_whole(model_config)
    before = read_hf_config(source)
    config = {key: value for key, value in source.items() if key != "transformers_version"}
    nested = {TEXT: dict(config.get(TEXT) or {}), VISION: dict(config.get(VISION) or {})}
    text = read_text(nested[TEXT])
    if before.text != model_config.text:  # but for what the whole model's fields say
        nested[TEXT] = write_text(
            replace(model_config.text, tied=text.tied, dtype=text.dtype), nested[TEXT]
        )
    nested[TEXT] |= _written(before, model_config, _MTP_FIELDS)
    nested[VISION] |= _written(before.vision, model_config.vision, _VISION_FIELDS)
    config |= _written(before, model_config, _FIELDS)
    if before.dtype != model_config.dtype:
        for each in (config, *nested.values()):
            each.pop("torch_dtype", None)
            each["dtype"] = model_config.dtype
    return config | {field: each for field, each in nested.items() if each}


def _written_whole(model_config: Exaone45ModelConfig) -> dict[str, Any]:
    text = write_text(model_config.text, {}) | _written(
        None, model_config, _MTP_FIELDS if model_config.mtp_depth else {}
    )
    del text["architectures"]
    vision = {"model_type": _VISION_TYPE, "dtype": model_config.dtype} | _written(
        None, model_config.vision, _VISION_FIELDS
    )
    whole = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "dtype": model_config.dtype}
    return whole | _written(None, model_config, _FIELDS) | {TEXT: text, VISION: vision}


def _written(before: object, model_config: object, names: Mapping[str, str]) -> dict[str, Any]:
    """Field -> value of the facts that have changed."""
    values = {
        field: getattr(model_config, name)
        for name, field in names.items()
        if _changed(before, model_config, name)
    }
    return {
        field: list(value) if isinstance(value, tuple) else value for field, value in values.items()
    }


def _changed(before: object, model_config: object, name: str) -> bool:
    return before is None or bool(getattr(before, name) != getattr(model_config, name))


_FIELDS = {
    "image_token": "image_token_id",
    "video_token": "video_token_id",
    "tied": "tie_word_embeddings",
}
_MTP_FIELDS = {
    "mtp_depth": _MTP_DEPTH,
    "mtp_shared": "mtp_share_layers",
    "mtp_loss_scale": "mtp_loss_scaling_factor",
}
