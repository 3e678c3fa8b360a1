"""Parameter mappings: which Hugging Face tensors make up which Megatron-Core parameter. No torch.

A family states its mappings once. Loading, saving, planning, random checkpoints and verification
follow from them, in both directions; they also tell, before a model is built or a tensor is read,
which names and shapes either side must have.

Axes are one letter each, in lower case in a vision encoder (`models/exaone45/weights.py`);
`ModelConfig.dims` gives their sizes::

    V vocabulary   H hidden   F feed-forward   D head   Q query heads x head   K KV heads x head
    E experts   M feed-forward of one expert   A feed-forward of all shared experts   1 one
    J 2 x hidden, the input of multi-token prediction   L labels of a head
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = [
    "HFTensor",
    "MappingKind",
    "ParamMapping",
    "aliases",
    "expected_hf",
    "expected_megatron",
    "fp32_names",
    "hf_tensors",
]


class MappingKind(StrEnum):
    """How the Hugging Face tensors lie in the Megatron-Core parameter, and how TP shards it."""

    COLUMN = "column"  # one tensor, sharded along its first axis
    ROW = "row"  # one tensor, sharded along its last axis
    REPLICATED = "replicated"  # one tensor, the same on every rank
    VOCAB = "vocab"  # one tensor, padded along its first axis for the layout and sharded along it
    QKV = "qkv"  # q, k, v interleaved by KV head, sharded by KV head
    GATED = "gated"  # gate over up; each rank has its shard of both
    SQUEEZED = "squeezed"  # one tensor [1, N], which Megatron-Core has as [N], replicated


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A Hugging Face tensor.

    Attributes:
        name: with `*` for the layer, and a second `*` for the expert.
        axes: one letter for each dimension.
        fp32: stored in fp32 whatever the model's dtype (`_keep_in_fp32_modules_strict`).
        fp32_param: the Megatron-Core parameter is fp32 whatever the tensor's dtype.
        std: standard deviation of the values in a random checkpoint; None: vectors are norm weights
            around 1, and matrices preserve the size of activations.
    """

    name: str
    axes: str
    fp32: bool = False
    std: float | None = None
    fp32_param: bool = False

    def shape(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape, given the size of each axis."""
        return tuple(1 if axis == "1" else dims[axis] for axis in self.axes)

    def dtype(self, model_dtype: str) -> str:
        """Return the tensor's dtype in a model of this dtype; both named as in config.json."""
        return "float32" if self.fp32 else model_dtype

    def numbered(self, *numbers: int) -> HFTensor:
        """Return the tensor of this layer (and expert)."""
        return replace(self, name=_numbered(self.name, *numbers))


def _numbered(name: str, *numbers: int) -> str:
    for number in numbers:
        name = name.replace("*", str(number), 1)
    return name


@dataclass(frozen=True, slots=True)
class ParamMapping:
    """One Megatron-Core parameter, or one for each layer, and the tensors that it is made of.

    Attributes:
        megatron: the parameter's name, with `*` for the layer, and a second `*` for the expert.
        layers: the global 0-based layers that have the parameter; empty for one outside the layers.
        experts: the number of experts that the second `*` stands for; 0: there is no second one.
        alias: the parameter's name in another module class; a model has one name or the other.
    """

    kind: MappingKind
    megatron: str
    hf: tuple[HFTensor, ...]
    layers: tuple[int, ...] = ()
    experts: int = 0
    alias: str | None = None

    def __post_init__(self) -> None:
        if self.is_per_layer and not self.layers:
            raise ValueError(
                f"the mapping of {self.megatron} has no layers; leave it out if no layer has it"
            )

    @property
    def is_per_layer(self) -> bool:
        """Whether the parameter is in the decoder's layers, and not outside them."""
        return "*" in self.megatron

    @property
    def on_first_stage(self) -> bool:
        """Whether a parameter outside the layers is on the first pipeline stage, not the last."""
        return self.megatron.startswith(("embedding.", "visual."))

    def expand(self) -> Iterator[tuple[str, tuple[HFTensor, ...]]]:
        """Yield each parameter's name with its tensors, layer by layer and expert by expert."""
        for numbers in self.numbers():
            yield (
                _numbered(self.megatron, *numbers),
                tuple(tensor.numbered(*numbers) for tensor in self.hf),
            )

    def names(self) -> Iterator[tuple[str, ...]]:
        """Yield each parameter's name and the names of its tensors, in the order of `expand`."""
        yield from zip(*self.columns(), strict=True)

    def columns(self) -> tuple[list[str], ...]:
        """Return the same, transposed: all parameters' names, then all names of each tensor."""
        return _columns(self)

    def aliases(self) -> Iterator[tuple[str, str]]:
        """Yield each parameter's alias and its name."""
        if self.alias is not None:
            for numbers in self.numbers():
                yield _numbered(self.alias, *numbers), _numbered(self.megatron, *numbers)

    def numbers(self) -> Iterator[tuple[int, ...]]:
        """Yield (), (layer,) or (layer, expert) of each parameter, in the order of `expand`."""
        if not self.is_per_layer:
            yield ()
        for layer in self.layers:
            if self.experts:
                yield from ((layer, expert) for expert in range(self.experts))
            else:
                yield (layer,)

    def with_hf_names(self, rename: Callable[[str], str]) -> ParamMapping:
        """Return the mapping of a model whose Hugging Face tensors have other names."""
        return replace(
            self, hf=tuple(replace(tensor, name=rename(tensor.name)) for tensor in self.hf)
        )


@functools.lru_cache(
    maxsize=128
)  # a checkpoint may have 60,000 names, which are used several times
def _columns(mapping: ParamMapping) -> tuple[list[str], ...]:
    names = (mapping.megatron, *(tensor.name for tensor in mapping.hf))
    return tuple(_column(name, mapping) for name in names)


def _column(name: str, mapping: ParamMapping) -> list[str]:
    """Return the name with each of the mapping's numbers, in the order of `numbers`."""
    before, star, rest = name.partition("*")
    if not star:
        return [name]
    if not mapping.experts:
        return [f"{before}{layer}{rest}" for layer in mapping.layers]
    between, _, after = rest.partition("*")
    ends = [f"{expert}{after}" for expert in range(mapping.experts)]
    return [
        start + end
        for start in [f"{before}{layer}{between}" for layer in mapping.layers]
        for end in ends
    ]


def hf_tensors(mappings: Iterable[ParamMapping]) -> dict[str, HFTensor]:
    """Return name -> tensor, of every Hugging Face tensor that has a mapping."""
    return {
        tensor.name: tensor for mapping in mappings for _, hf in mapping.expand() for tensor in hf
    }


def expected_hf(
    mappings: Iterable[ParamMapping], dims: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape, of every Hugging Face tensor that has a mapping."""
    found: dict[str, tuple[int, ...]] = {}
    for mapping in mappings:
        for tensor, names in zip(mapping.hf, mapping.columns()[1:], strict=True):
            found.update(dict.fromkeys(names, tensor.shape(dims)))
    return found


def fp32_names(mappings: Iterable[ParamMapping]) -> set[str]:
    """Return the Hugging Face tensors that are fp32 on disk whatever the model's dtype."""
    return {
        name
        for mapping in mappings
        if any(tensor.fp32 for tensor in mapping.hf)
        for tensor, names in zip(mapping.hf, mapping.columns()[1:], strict=True)
        if tensor.fp32
        for name in names
    }


def expected_megatron(mappings: Iterable[ParamMapping]) -> set[str]:
    """Return every Megatron-Core parameter's name, over all pipeline stages and EP ranks."""
    return {name for mapping in mappings for name in mapping.columns()[0]}


def aliases(mappings: Iterable[ParamMapping]) -> dict[str, str]:
    """Return alias -> name in `expected_megatron`."""
    return {alias: name for mapping in mappings for alias, name in mapping.aliases()}
