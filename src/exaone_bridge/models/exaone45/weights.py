"""EXAONE 4.5's parameter mappings: language model, vision encoder, multi-token prediction (MTP).

The vision encoder is Transformers' own module, replicated on every rank: its parameters keep their
names, and its fused QKV projection stays fused. Axes of the vision encoder::

    c channels   t frames of a patch   p patch   v hidden   q queries, keys and values
    f feed-forward   m hidden of all patches that become one token   o out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from exaone_bridge.models.exaone4.weights import exaone4_mappings
from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.schema.model_config import VisionConfig
from exaone_bridge.schema.mtp_mappings import mtp_mappings
from exaone_bridge.schema.param_mapping import HFTensor, MappingKind, ParamMapping

__all__ = [
    "PASSTHROUGH",
    "exaone45_mappings",
    "exaone45_mappings_with_mtp",
    "passthrough_tensors",
    "without_passthrough",
]

PASSTHROUGH = r"mtp\..+"  # which Transformers ignores (`_keys_to_ignore_on_load_unexpected`)

_BIAS_STD = 0.1  # of a random checkpoint's biases


def exaone45_mappings(model_config: Exaone45ModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of every parameter of a model that was built without MTP."""
    language_model = (
        mapping.with_hf_names(_in_language_model) for mapping in exaone4_mappings(model_config)
    )
    vision_encoder = (
        ParamMapping(MappingKind.REPLICATED, tensor.name.removeprefix("model."), (tensor,))
        for tensor in _vision_encoder(model_config.vision)
    )
    return (*language_model, *vision_encoder)


def _in_language_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _vision_encoder(vision: VisionConfig) -> Iterator[HFTensor]:
    """Yield the tensors block by block: `*` in a name is a layer of the language model."""
    patches = "model.visual.patch_embed.proj.weight"
    yield HFTensor(patches, "vctpp", std=vision.patch_elements**-0.5)
    for block in range(vision.depth):
        name = f"model.visual.blocks.{block}"
        yield HFTensor(f"{name}.norm1.weight", "v")
        yield HFTensor(f"{name}.norm2.weight", "v")
        yield from _linear(f"{name}.attn.qkv", "qv")
        yield from _linear(f"{name}.attn.proj", "vv")
        yield from _linear(f"{name}.mlp.gate_proj", "fv")
        yield from _linear(f"{name}.mlp.up_proj", "fv")
        yield from _linear(f"{name}.mlp.down_proj", "vf")
    yield HFTensor("model.visual.merger.ln_q.weight", "v")
    yield from _linear("model.visual.merger.mlp.0", "mm")
    yield from _linear("model.visual.merger.mlp.2", "om")


def _linear(name: str, axes: str) -> Iterator[HFTensor]:
    yield HFTensor(f"{name}.weight", axes)
    yield HFTensor(f"{name}.bias", axes[0], std=_BIAS_STD)


def without_passthrough(model_config: Exaone45ModelConfig) -> Exaone45ModelConfig:
    """Return the config of the same model without MTP on disk."""
    return dataclasses.replace(model_config, mtp=None)


def exaone45_mappings_with_mtp(model_config: Exaone45ModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of every parameter of a model that was built with MTP."""
    return (*exaone45_mappings(model_config), *_mtp(model_config))


def passthrough_tensors(model_config: Exaone45ModelConfig) -> tuple[HFTensor, ...]:
    """Return the tensors of MTP, which pass through where it is not built."""
    return tuple(tensor for mapping in _mtp(model_config) for tensor in mapping.hf)


def _mtp(model_config: Exaone45ModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of MTP, whose layers are EXAONE 4.0's."""
    num_layers = 0 if model_config.mtp is None else model_config.mtp.num_layers
    return tuple(mtp_mappings(exaone4_mappings(model_config.text), num_layers))
