"""Places of the arithmetic where both sides can be looked at: which module of Transformers, which of Megatron-Core.

The table follows from a family's rows, like everything that knows both sides' names. A place is named by the Hugging
Face module whose output it is. No torch here; `traces.py` has the hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from exaone_bridge.schema.param_mapping import MappingKind, ParamMapping

__all__ = ["LOGITS", "VISION_ENCODER", "Capture", "ProbePoint", "probe_points"]

LOGITS = "logits"  # the place after all others
VISION_ENCODER = "vision "  # before the sublayers of a vision tower


class Capture(StrEnum):
    """What is taken from Megatron-Core's module."""

    OUTPUT = "output"
    INPUT = "input"  # of a norm inside a linear: the sublayer's own output
    FUSED_NORM = "fused norm"  # a norm inside the linear that follows: computed again from its input, weight, epsilon
    QUERY = "query"  # parts of a fused projection's output
    KEY = "key"
    VALUE = "value"
    ROUTER = "router"  # weights of the chosen experts, zero elsewhere
    PATCHES = "patches"  # the output of a tower's module: for every image, then for every video


@dataclass(frozen=True, slots=True)
class ProbePoint:
    """One place.

    Attributes:
        hf: the module of Transformers.
        sublayer: what the place belongs to.
        megatron: the module of Megatron-Core, by its global layer number.
        heads: one rank of tensor parallelism holds some of the heads only.
        block: of a vision tower, 0-based; None outside its blocks.
    """

    hf: str
    layer: int | None
    sublayer: str
    megatron: str
    capture: Capture
    heads: bool = False
    block: int | None = None


def probe_points(mappings: Iterable[ParamMapping]) -> tuple[ProbePoint, ...]:
    """Every place of a model with these rows, in no particular order."""
    mappings = tuple(mappings)
    vision_encoder = tuple(
        mapping for mapping in mappings if mapping.megatron.startswith("visual.")
    )
    mappings = tuple(mapping for mapping in mappings if not mapping.megatron.startswith("visual."))
    points = (*_sublayers(mappings), *_inside(mappings), *_vision_encoder(vision_encoder))
    return tuple({point.hf: point for point in points}.values())


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _vision_encoder(mappings: tuple[ParamMapping, ...]) -> Iterator[ProbePoint]:
    """Patches, norms, attention, feed-forward and the whole of each block, merger and features; both sides have one
    name for each."""
    for mapping in mappings:
        parts = mapping.megatron.split(".")  # visual.blocks.3.attn.proj.weight
        prefix = mapping.hf[0].name.removesuffix(mapping.megatron)
        block = int(parts[2]) if parts[1] == "blocks" else None
        if block is None:
            found = [
                (parts[:2], "embedding" if parts[1] == "patch_embed" else "merger"),
                (parts[:1], "features"),
            ]
        elif "norm" in parts[3]:
            found = [(parts[:4], "norm")]
        else:
            found = [
                (parts[:4], "attention" if "attn" in parts[3] else "mlp"),
                (parts[:3], "layer"),
            ]
        for module, sublayer in found:
            name = ".".join(module)
            yield ProbePoint(
                prefix + name, None, VISION_ENCODER + sublayer, name, Capture.PATCHES, block=block
            )


def _inside(mappings: tuple[ParamMapping, ...]) -> Iterator[ProbePoint]:
    """Norms, projections of queries, keys and values, routers, and the embedding."""
    for mapping in mappings:
        if mapping.experts:
            continue
        for number, hf in zip(mapping.layers or (None,), mapping.expand(), strict=True):
            (megatron, tensors), here = hf, number
            name = _module(tensors[0].name)
            if mapping.kind is MappingKind.QKV and megatron.endswith(".weight"):
                for tensor, take in zip(
                    tensors, (Capture.QUERY, Capture.KEY, Capture.VALUE), strict=True
                ):
                    yield ProbePoint(
                        _module(tensor.name), here, "attention", _module(megatron), take, heads=True
                    )
            elif megatron.endswith(".router.weight"):
                yield ProbePoint(name, here, "router", _module(megatron), Capture.ROUTER)
            elif megatron == "embedding.word_embeddings.weight":
                yield ProbePoint(name, None, "embedding", "embedding", Capture.OUTPUT)
            elif (
                mapping.kind is MappingKind.REPLICATED
                and "norm" in megatron.rpartition(".")[0] + name.rpartition(".")[2]
            ):
                fused = megatron.endswith(".layer_norm_weight")
                heads = tensors[0].axes == "D"
                yield ProbePoint(
                    name,
                    here,
                    "norm",
                    _module(megatron),
                    Capture.FUSED_NORM if fused else Capture.OUTPUT,
                    heads=heads,
                )


def _sublayers(mappings: tuple[ParamMapping, ...]) -> Iterator[ProbePoint]:
    """Attention, feed-forward and the whole of each layer; a norm inside the last linear is not part of a sublayer."""
    expanded = {
        megatron: tensors
        for mapping in mappings
        if not mapping.experts
        for megatron, tensors in mapping.expand()
    }
    for mapping in mappings:
        if mapping.kind is not MappingKind.QKV or not mapping.megatron.endswith(".weight"):
            continue
        for layer, (_, tensors) in zip(mapping.layers, mapping.expand(), strict=True):
            attention = _module(_module(tensors[0].name))  # model.layers.3.self_attn
            theirs, ours = _module(attention), f"decoder.layers.{layer}"
            for hf, module, last, sublayer in (
                (attention, "self_attention", "linear_proj", "attention"),
                (f"{theirs}.mlp", "mlp", "linear_fc2", "mlp"),
            ):
                norm = f"{ours}.{module}.{last}.post_layernorm"
                inside = f"{norm}.weight" in expanded
                name, take = (
                    (norm, Capture.INPUT) if inside else (f"{ours}.{module}", Capture.OUTPUT)
                )
                yield ProbePoint(hf, layer, sublayer, name, take)
            yield ProbePoint(theirs, layer, "layer", ours, Capture.OUTPUT)
