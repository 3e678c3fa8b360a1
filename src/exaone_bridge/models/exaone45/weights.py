"""EXAONE 4.5's rows: the EXAONE 4.0 language model's, the vision tower's, and what multi-token prediction ships.

The tower is Transformers' own module, whole on every rank: its parameters keep their names, and its fused projection of
queries, keys and values stays fused. Axes of the tower:
    c channels   t frames of a patch   p patch   v hidden   q queries, keys and values   f feed-forward
    m hidden of all patches that become one word   o out
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from exaone_bridge.models.exaone4.weights import exaone4_rows
from exaone_bridge.models.exaone45.config import Exaone45Facts, VisionFacts
from exaone_bridge.schema.param_mapping import HFTensor, Kind, Row, hf_renamed

__all__ = [
    "CARRIED",
    "carried_tensors",
    "exaone45_rows",
    "exaone45_rows_with_mtp",
    "without_carried",
]

CARRIED = r"mtp\..+"  # which Transformers ignores (`_keys_to_ignore_on_load_unexpected`)

_BIAS_STD = 0.1


def exaone45_rows(facts: Exaone45Facts) -> tuple[Row, ...]:
    """Every parameter of an EXAONE 4.5 model."""
    language = (hf_renamed(row, _in_language_model) for row in exaone4_rows(facts))
    return (
        *language,
        *(
            Row(Kind.REPLICATED, _of_tower(tensor.name), (tensor,))
            for tensor in _tower(facts.vision)
        ),
    )


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


def exaone45_rows_with_mtp(facts: Exaone45Facts) -> tuple[Row, ...]:
    """Every parameter of a model that was built with its multi-token prediction."""
    return (*exaone45_rows(facts), *_mtp(facts))


def carried_tensors(facts: Exaone45Facts) -> tuple[HFTensor, ...]:
    """What a checkpoint with multi-token prediction ships."""
    return tuple(tensor for row in _mtp(facts) for tensor in row.hf)


def _mtp(facts: Exaone45Facts) -> Iterator[Row]:
    """Of each depth: EXAONE 4.0's layer, and what leads to it and from it, of which there is one on disk."""
    for depth in range(facts.mtp_layers):
        name = f"mtp.layers.{depth}"
        for row in exaone4_rows(facts.text):
            if row.layers:
                inside = row.megatron.replace("decoder.layers.*", f"{name}.mtp_model_layer")
                yield dataclasses.replace(
                    hf_renamed(row, _in_prediction(depth)), megatron=inside, layers=()
                )
        if depth == 0:
            yield Row(Kind.COLUMN, f"{name}.eh_proj.weight", (HFTensor("mtp.fc.weight", "HJ"),))
            yield Row(
                Kind.REPLICATED,
                f"{name}.enorm.weight",
                (HFTensor("mtp.pre_fc_norm_embedding.weight", "H"),),
            )
            yield Row(
                Kind.REPLICATED,
                f"{name}.hnorm.weight",
                (HFTensor("mtp.pre_fc_norm_hidden.weight", "H"),),
            )
            yield Row(
                Kind.REPLICATED,
                f"{name}.final_layernorm.weight",
                (HFTensor("mtp.norm.weight", "H"),),
            )


def _in_prediction(depth: int) -> Callable[[str], str]:
    return lambda name: name.replace("model.layers.*", f"mtp.layers.{depth}")
