"""EXAONE 4.5's rows: the EXAONE 4.0 language model's, the vision tower's, and what multi-token prediction ships.

The tower is Transformers' own module, whole on every rank: its parameters keep their names, and its fused projection of
queries, keys and values stays fused. Axes of the tower::

    c channels   t frames of a patch   p patch   v hidden   q queries, keys and values   f feed-forward
    m hidden of all patches that become one word   o out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from exaone_bridge.models.exaone4.weights import exaone4_mappings
from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.schema.model_config import VisionConfig
from exaone_bridge.schema.param_mapping import HFTensor, MappingKind, ParamMapping, hf_renamed

__all__ = [
    "PASSTHROUGH",
    "exaone45_mappings",
    "exaone45_mappings_with_mtp",
    "passthrough_tensors",
    "without_passthrough",
]

PASSTHROUGH = r"mtp\..+"  # which Transformers ignores (`_keys_to_ignore_on_load_unexpected`)

_BIAS_STD = 0.1


def exaone45_mappings(model_config: Exaone45ModelConfig) -> tuple[ParamMapping, ...]:
    """Every parameter of an EXAONE 4.5 model."""
    language = (
        hf_renamed(mapping, _in_language_model) for mapping in exaone4_mappings(model_config)
    )
    return (
        *language,
        *(
            ParamMapping(MappingKind.REPLICATED, _is_vision(tensor.name), (tensor,))
            for tensor in _vision_encoder(model_config.vision)
        ),
    )


def _in_language_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _is_vision(name: str) -> str:
    return name.removeprefix("model.")


def _vision_encoder(vision: VisionConfig) -> Iterator[HFTensor]:
    """Written out block by block: a `*` stands for a layer of the language model."""
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
    """The facts of the same model without multi-token prediction beside it."""
    return dataclasses.replace(model_config, mtp=None)


def exaone45_mappings_with_mtp(model_config: Exaone45ModelConfig) -> tuple[ParamMapping, ...]:
    """Every parameter of a model that was built with its multi-token prediction."""
    return (*exaone45_mappings(model_config), *_mtp(model_config))


def passthrough_tensors(model_config: Exaone45ModelConfig) -> tuple[HFTensor, ...]:
    """What a checkpoint with multi-token prediction ships."""
    return tuple(tensor for mapping in _mtp(model_config) for tensor in mapping.hf)


def _mtp(model_config: Exaone45ModelConfig) -> Iterator[ParamMapping]:
    """Of each depth: EXAONE 4.0's layer, and what leads to it and from it, of which there is one on disk."""
    for depth in range(0 if model_config.mtp is None else model_config.mtp.num_layers):
        name = f"mtp.layers.{depth}"
        for mapping in exaone4_mappings(model_config.text):
            if mapping.layers:
                inside = mapping.megatron.replace("decoder.layers.*", f"{name}.mtp_model_layer")
                yield dataclasses.replace(
                    hf_renamed(mapping, _in_prediction(depth)), megatron=inside, layers=()
                )
        if depth == 0:
            yield ParamMapping(
                MappingKind.COLUMN, f"{name}.eh_proj.weight", (HFTensor("mtp.fc.weight", "HJ"),)
            )
            yield ParamMapping(
                MappingKind.REPLICATED,
                f"{name}.enorm.weight",
                (HFTensor("mtp.pre_fc_norm_embedding.weight", "H"),),
            )
            yield ParamMapping(
                MappingKind.REPLICATED,
                f"{name}.hnorm.weight",
                (HFTensor("mtp.pre_fc_norm_hidden.weight", "H"),),
            )
            yield ParamMapping(
                MappingKind.REPLICATED,
                f"{name}.final_layernorm.weight",
                (HFTensor("mtp.norm.weight", "H"),),
            )


def _in_prediction(depth: int) -> Callable[[str], str]:
    return lambda name: name.replace("model.layers.*", f"mtp.layers.{depth}")
