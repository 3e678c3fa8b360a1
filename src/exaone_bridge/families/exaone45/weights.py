"""EXAONE 4.5's rows: the EXAONE 4.0 language model's, the vision tower's, and what multi-token prediction ships.

The tower is Transformers' own module, whole on every rank: its parameters keep their names, and its fused projection of
queries, keys and values stays fused. Axes of the tower:
    c channels   t frames of a patch   p patch   v hidden   q queries, keys and values   f feed-forward
    m hidden of all patches that become one word   o out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from exaone_bridge.families.exaone4.weights import exaone4_rows
from exaone_bridge.families.exaone45.config import Exaone45Facts, VisionFacts
from exaone_bridge.parts.rows import HFTensor, Kind, Row, hf_renamed

__all__ = ["CARRIED", "carried_tensors", "exaone45_rows", "without_carried"]

CARRIED = r"mtp\..+"  # which Transformers ignores (`_keys_to_ignore_on_load_unexpected`)

_BIAS_STD = 0.1


def exaone45_rows(facts: Exaone45Facts) -> tuple[Row, ...]:
    """Every parameter of an EXAONE 4.5 model."""
    language = (hf_renamed(row, _in_language_model) for row in exaone4_rows(facts))
    return (*language, *(Row(Kind.REPLICATED, _of_tower(tensor.name), (tensor,)) for tensor in _tower(facts.vision)))


def _in_language_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _of_tower(name: str) -> str:
    return name.removeprefix("model.")


def _tower(vision: VisionFacts) -> Iterator[HFTensor]:
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


def without_carried(facts: Exaone45Facts) -> Exaone45Facts:
    """The facts of the same model without multi-token prediction beside it."""
    return dataclasses.replace(facts, mtp_depth=0)


def carried_tensors(facts: Exaone45Facts) -> tuple[HFTensor, ...]:
    """What a checkpoint with multi-token prediction ships: EXAONE 4.0 layers, and what leads to them and from them."""
    if not facts.mtp_depth:
        return ()
    layers = dataclasses.replace(
        facts.text, num_layers=facts.mtp_layers, windows=facts.windows[:1] * facts.mtp_layers, rope=(True,)
    )
    inside = (tensor for row in exaone4_rows(layers) if row.layers for _, hf in row.expand() for tensor in hf)
    return (
        HFTensor("mtp.fc.weight", "HJ"),
        HFTensor("mtp.pre_fc_norm_embedding.weight", "H"),
        HFTensor("mtp.pre_fc_norm_hidden.weight", "H"),
        *(dataclasses.replace(tensor, name=tensor.name.replace("model.", "mtp.", 1)) for tensor in inside),
        HFTensor("mtp.norm.weight", "H"),
    )
