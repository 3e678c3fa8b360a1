"""Rows: which Hugging Face tensors make up which Megatron-Core parameter. Plain data, no torch.

One table of rows a family serves both directions and both users: it is bound to Megatron-Bridge's
mapping objects (`host/bind.py`), and it says, before any model is built or any tensor is read,
which names and shapes either side must have.

Axes are one letter each, and a family's facts give their sizes:
    V vocabulary   H hidden   F feed-forward   D head   Q query heads x head   K key-value heads x head
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "HFTensor",
    "Kind",
    "Row",
    "embeddings",
    "expected_hf",
    "expected_megatron",
    "gqa",
    "post_norm",
    "qk_norm",
    "swiglu",
]


class Kind(StrEnum):
    """How the Hugging Face tensors lie in the Megatron parameter, and how tensor parallelism cuts it."""

    COLUMN = "column"  # one tensor, cut along its first axis
    ROW = "row"  # one tensor, cut along its last axis
    REPLICATED = "replicated"  # one tensor, whole on every rank
    VOCAB = "vocab"  # one tensor, cut along its first axis after padding it to what the layout needs
    QKV = "qkv"  # q, k, v interleaved by key-value group, cut by group
    GATED = "gated"  # gate over up; each rank holds its cut of both


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A Hugging Face tensor: its name, with `*` for the layer, and its axes."""

    name: str
    axes: str

    def shape(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape, given the size of each axis."""
        return tuple(dims[axis] for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron-Core parameter (or one a layer, where its name has `*`) and the tensors it is made of.

    `layers` are the global 0-based layer numbers that `*` stands for; empty for a parameter outside the layers.
    """

    kind: Kind
    megatron: str
    hf: tuple[HFTensor, ...]
    layers: tuple[int, ...] = ()

    def expand(self) -> Iterator[tuple[str, tuple[HFTensor, ...]]]:
        """Each concrete Megatron-Core name with its concrete tensors, layer by layer."""
        if not self.layers:
            yield self.megatron, self.hf
        for layer in self.layers:
            number = str(layer)
            yield (
                self.megatron.replace("*", number),
                tuple(HFTensor(tensor.name.replace("*", number), tensor.axes) for tensor in self.hf),
            )


def expected_hf(rows: Iterable[Row], dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every Hugging Face tensor that the rows claim."""
    return {tensor.name: tensor.shape(dims) for row in rows for _, hf in row.expand() for tensor in hf}


def expected_megatron(rows: Iterable[Row]) -> set[str]:
    """The name of every Megatron-Core parameter that the rows fill, over all pipeline stages."""
    return {name for row in rows for name, _ in row.expand()}


# The groups that recur. `layers`: the global 0-based layers that have them.


def embeddings(*, tied: bool) -> tuple[Row, ...]:
    """Word embeddings, the final norm and, unless it is tied to the embeddings, the output layer."""
    head = Row(Kind.VOCAB, "output_layer.weight", (HFTensor("lm_head.weight", "VH"),))
    return (
        Row(Kind.VOCAB, "embedding.word_embeddings.weight", (HFTensor("model.embed_tokens.weight", "VH"),)),
        Row(Kind.REPLICATED, "decoder.final_layernorm.weight", (HFTensor("model.norm.weight", "H"),)),
        *(() if tied else (head,)),
    )


def gqa(layers: tuple[int, ...]) -> tuple[Row, ...]:
    """Grouped-query attention's projections, without biases."""
    ours, theirs = "decoder.layers.*.self_attention", "model.layers.*.self_attn"
    return (
        Row(
            Kind.QKV,
            f"{ours}.linear_qkv.weight",
            (
                HFTensor(f"{theirs}.q_proj.weight", "QH"),
                HFTensor(f"{theirs}.k_proj.weight", "KH"),
                HFTensor(f"{theirs}.v_proj.weight", "KH"),
            ),
            layers,
        ),
        Row(Kind.ROW, f"{ours}.linear_proj.weight", (HFTensor(f"{theirs}.o_proj.weight", "HQ"),), layers),
    )


def qk_norm(layers: tuple[int, ...]) -> tuple[Row, ...]:
    """Norms over the head axis of queries and keys."""
    return tuple(
        Row(
            Kind.REPLICATED,
            f"decoder.layers.*.self_attention.{which}_layernorm.weight",
            (HFTensor(f"model.layers.*.self_attn.{which}_norm.weight", "D"),),
            layers,
        )
        for which in "qk"
    )


def swiglu(layers: tuple[int, ...]) -> tuple[Row, ...]:
    """The gated feed-forward's projections, without biases."""
    ours, theirs = "decoder.layers.*.mlp", "model.layers.*.mlp"
    return (
        Row(
            Kind.GATED,
            f"{ours}.linear_fc1.weight",
            (HFTensor(f"{theirs}.gate_proj.weight", "FH"), HFTensor(f"{theirs}.up_proj.weight", "FH")),
            layers,
        ),
        Row(Kind.ROW, f"{ours}.linear_fc2.weight", (HFTensor(f"{theirs}.down_proj.weight", "HF"),), layers),
    )


def post_norm(layers: tuple[int, ...], *, attention: str, mlp: str) -> tuple[Row, ...]:
    """Norms on the outputs of attention and feed-forward; `attention`, `mlp`: what the family calls them."""
    return (
        Row(
            Kind.REPLICATED,
            "decoder.layers.*.self_attention.linear_proj.post_layernorm.weight",
            (HFTensor(f"model.layers.*.{attention}.weight", "H"),),
            layers,
        ),
        Row(
            Kind.REPLICATED,
            "decoder.layers.*.mlp.linear_fc2.post_layernorm.weight",
            (HFTensor(f"model.layers.*.{mlp}.weight", "H"),),
            layers,
        ),
    )
