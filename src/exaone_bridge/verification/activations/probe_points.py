"""Probe points: the activations that both models compute, and the modules that output them.

The probe points of a model follow from its parameter mappings, which name the modules of both
sides. No torch is imported here; `capture.py` hooks the modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from exaone_bridge.schema.param_mapping import MappingKind, ParamMapping

__all__ = ["LOGITS", "VISION_PREFIX", "Capture", "ProbePoint", "probe_points"]

LOGITS = "logits"  # the name of the last activation, which no probe point has
VISION_PREFIX = "vision "  # of the sublayers of a vision encoder


class Capture(StrEnum):
    """How an activation is captured from the Megatron-Core module."""

    OUTPUT = "output"
    INPUT = "input"  # of the norm inside a linear: the output of the sublayer itself
    FUSED_NORM = "fused norm"  # computed again from the input, weight and epsilon of the linear
    QUERY = "query"  # slices of the output of the fused QKV projection
    KEY = "key"
    VALUE = "value"
    ROUTER = "router"  # the weights of the chosen experts, zero elsewhere
    PATCHES = "patches"  # a vision module's output, once for all images and once for all videos


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """One activation that both models compute.

    Attributes:
        hf: the Transformers module whose output it is; also the name of the activation.
        layer: global, 0-based; None outside the decoder layers.
        sublayer: what the module belongs to; see `ActivationDiff`.
        megatron: the Megatron-Core module, with its global layer number.
        capture: how it is captured from that module.
        head_sharded: whether a TP rank computes it for its own attention heads only.
        block: of a vision encoder, 0-based; None outside its blocks.
    """

    hf: str
    layer: int | None
    sublayer: str
    megatron: str
    capture: Capture
    head_sharded: bool = False
    block: int | None = None


def probe_points(mappings: Iterable[ParamMapping]) -> tuple[ProbePoint, ...]:
    """Derive the probe points of a model from its parameter mappings.

    Returns:
        The probe points in no particular order, one for each Transformers module.
    """
    mappings = tuple(mappings)
    vision = tuple(each for each in mappings if each.megatron.startswith("visual."))
    language = tuple(each for each in mappings if not each.megatron.startswith("visual."))
    points = (*_sublayers(language), *_inside(language), *_vision_encoder(vision))
    return tuple({point.hf: point for point in points}.values())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _concrete(mapping: ParamMapping) -> Iterator[tuple[int | None, str, list[str]]]:
    """Yield layer, Megatron-Core name and Hugging Face names of each parameter of a mapping.

    A mapping of layers that has none (a kind of layer that this model lacks) yields nothing.
    """
    for numbers, (megatron, tensors) in zip(mapping.numbers(), mapping.expand(), strict=True):
        yield (numbers[0] if numbers else None), megatron, [tensor.name for tensor in tensors]


def _vision_encoder(mappings: tuple[ParamMapping, ...]) -> Iterator[ProbePoint]:
    """Yield patches, norms, attention, MLP and output of each block, merger and features.

    Both sides have the same module names below `visual`.
    """
    for mapping in mappings:
        parts = mapping.megatron.split(".")  # visual.blocks.3.attn.proj.weight
        prefix = mapping.hf[0].name.removesuffix(mapping.megatron)
        block = int(parts[2]) if parts[1] == "blocks" else None
        if block is None:
            outer = "embedding" if parts[1] == "patch_embed" else "merger"
            modules = [(parts[:2], outer), (parts[:1], "features")]
        elif "norm" in parts[3]:
            modules = [(parts[:4], "norm")]
        else:
            inner = "attention" if "attn" in parts[3] else "mlp"
            modules = [(parts[:4], inner), (parts[:3], "layer")]
        for path, sublayer in modules:
            name = ".".join(path)
            yield ProbePoint(
                prefix + name, None, VISION_PREFIX + sublayer, name, Capture.PATCHES, block=block
            )


def _inside(mappings: tuple[ParamMapping, ...]) -> Iterator[ProbePoint]:
    """Yield the embedding, norms, query, key and value projections, and routers."""
    for mapping in mappings:
        if mapping.experts:
            continue
        for layer, megatron, names in _concrete(mapping):
            hf, module = _module(names[0]), _module(megatron)
            if mapping.kind is MappingKind.QKV and megatron.endswith(".weight"):
                captures = (Capture.QUERY, Capture.KEY, Capture.VALUE)
                for name, capture in zip(names, captures, strict=True):
                    yield ProbePoint(
                        _module(name), layer, "attention", module, capture, head_sharded=True
                    )
            elif megatron.endswith(".router.weight"):
                yield ProbePoint(hf, layer, "router", module, Capture.ROUTER)
            elif megatron == "embedding.word_embeddings.weight":
                yield ProbePoint(hf, None, "embedding", "embedding", Capture.OUTPUT)
            elif mapping.kind is MappingKind.REPLICATED and "norm" in module + _leaf(hf):
                fused = megatron.endswith(".layer_norm_weight")
                capture = Capture.FUSED_NORM if fused else Capture.OUTPUT
                per_head = mapping.hf[0].axes == "D"
                yield ProbePoint(hf, layer, "norm", module, capture, head_sharded=per_head)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _sublayers(mappings: tuple[ParamMapping, ...]) -> Iterator[ProbePoint]:
    """Yield attention, MLP and output of each layer.

    A norm inside the last linear of a sublayer is not part of the sublayer.
    """
    parameters = {
        megatron
        for mapping in mappings
        if not mapping.experts
        for _, megatron, _ in _concrete(mapping)
    }
    for mapping in mappings:
        if mapping.kind is not MappingKind.QKV or not mapping.megatron.endswith(".weight"):
            continue
        for layer, _, names in _concrete(mapping):
            if layer is None:
                continue
            attention = _module(_module(names[0]))  # model.layers.3.self_attn
            hf, megatron = _module(attention), f"decoder.layers.{layer}"
            for name, module, linear, sublayer in (
                (attention, "self_attention", "linear_proj", "attention"),
                (f"{hf}.mlp", "mlp", "linear_fc2", "mlp"),
            ):
                norm = f"{megatron}.{module}.{linear}.post_layernorm"
                if f"{norm}.weight" in parameters:
                    yield ProbePoint(name, layer, sublayer, norm, Capture.INPUT)
                else:
                    yield ProbePoint(name, layer, sublayer, f"{megatron}.{module}", Capture.OUTPUT)
            yield ProbePoint(hf, layer, "layer", megatron, Capture.OUTPUT)
