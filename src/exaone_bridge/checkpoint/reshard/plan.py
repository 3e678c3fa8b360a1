"""The plan: which rectangle of which Hugging Face tensor is which rectangle of which Megatron-Core parameter.

Computed from rows, facts and a layout alone: no model is built, no tensor is read, no torch is imported. A row's
parameter is cut in the same way in every layer and for every expert, so a `ParamPlan` states its rectangles once; `Plan`
says who holds which layers and experts. So a plan of 60,000 tensors is as small as one of 600, and both directions
follow it. `prove.py` checks it, and shares no arithmetic with it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.dtypes import itemsize
from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import MappingKind, ParamMapping

__all__ = [
    "LocalParam",
    "ParamPlan",
    "Rank",
    "ReshardPlan",
    "ShardSpec",
    "Slice",
    "SliceCopy",
    "check_layout",
    "elements",
    "ordinal_of",
    "reshard_plan",
    "writer",
]

Slice = tuple[tuple[int, int], ...]  # (begin, end) along each axis

_TIED = ("embedding.word_embeddings.weight", "output_layer.weight")
_CUT_BY_NOBODY = (MappingKind.REPLICATED, MappingKind.SQUEEZED)


def elements(box: Slice) -> int:
    """How many elements a rectangle has."""
    return math.prod(end - begin for begin, end in box)


class SliceCopy(NamedTuple):
    """A rectangle that both sides have; `tensor` counts the row's Hugging Face tensors from 0."""

    tensor: int
    hf: Slice
    megatron: Slice


class ShardSpec(NamedTuple):
    """What one rank of those that cut a parameter holds of it: its shape, what fills it, and what nothing fills."""

    shape: tuple[int, ...]
    copies: tuple[SliceCopy, ...]
    padding: tuple[Slice, ...] = ()


class Rank(NamedTuple):
    """A rank's place: pipeline stage, and its number among those that cut layers, deal out experts, and cut experts."""

    pp: int = 0
    tp: int = 0
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """One row, and how its parameters are cut.

    Attributes:
        shapes: of the row's Hugging Face tensors.
        itemsizes: bytes of an element of each.
        cuts: by the rank's number among those that cut it; a single one where nobody does.
    """

    mapping: ParamMapping
    shapes: tuple[tuple[int, ...], ...]
    itemsizes: tuple[int, ...]
    cuts: tuple[ShardSpec, ...]

    @property
    def per_expert(self) -> bool:
        """Whether each expert has one."""
        return self.mapping.experts > 0

    def cut(self, rank: Rank) -> ShardSpec:
        """What this rank holds of each of its parameters."""
        return self.cuts[(rank.etp if self.per_expert else rank.tp) % len(self.cuts)]

    def read_bytes(self, rank: Rank) -> int:
        """Bytes of the Hugging Face tensors that one parameter of this rank is made of."""
        return sum(
            elements(copy.hf) * self.itemsizes[copy.tensor] for copy in self.cut(rank).copies
        )

    def held_bytes(self, rank: Rank) -> int:
        """Bytes of one parameter on this rank, padding included."""
        return math.prod(self.cut(rank).shape) * self.itemsizes[0]


class LocalParam(NamedTuple):
    """One parameter on one rank: in which of its chunks, by which name there, and which layer (and expert) it is."""

    chunk: int
    name: str
    part: ParamPlan
    numbers: tuple[int, ...]
    cut: ShardSpec
    replica: bool  # of a parameter that another stage owns: a tied output layer


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """The copies of every rank of a layout.

    Attributes:
        parts: one for each row.
        stages: the global 0-based layers of each chunk of each pipeline rank.
        experts: the global 0-based experts of each expert-parallel rank.
        tied: whether the last of several stages holds a copy of the embedding as its output layer.
        grouped: whether one module holds all experts (Transformer Engine's grouped GEMM), or each its own.
    """

    layout: Layout
    parts: tuple[ParamPlan, ...]
    stages: tuple[tuple[tuple[int, ...], ...], ...]
    experts: tuple[tuple[int, ...], ...]
    tied: bool
    grouped: bool

    def ranks(self) -> list[Rank]:
        """Every rank of the least world of this layout, in Megatron-Core's order (tp fastest, pp slowest)."""
        tp, pp, ep, etp = self.layout.tp, self.layout.pp, self.layout.ep, self.layout.expert_tp
        in_stage = self.layout.ranks // pp
        return [
            Rank(pp=stage, tp=number % tp, ep=number // etp % ep, etp=number % etp)
            for stage in range(pp)
            for number in range(in_stage)
        ]

    def held(self, rank: Rank) -> Iterator[LocalParam]:
        """Every parameter of this rank, chunk by chunk within a row."""
        last = len(self.stages) - 1
        for part in self.parts:
            cut = part.cut(rank)
            name = (
                part.mapping.megatron
                if self.grouped
                else part.mapping.alias or part.mapping.megatron
            )
            if not part.mapping.is_per_layer:
                first = part.mapping.on_first_stage
                if rank.pp == (0 if first else last):
                    yield LocalParam(
                        0 if first else len(self.stages[last]) - 1, name, part, (), cut, False
                    )
                if self.tied and name == _TIED[0] and rank.pp == last and last > 0:
                    yield LocalParam(len(self.stages[last]) - 1, _TIED[1], part, (), cut, True)
                continue
            layers = frozenset(part.mapping.layers)
            before, between, after = _split(name)
            for chunk, here in enumerate(self.stages[rank.pp]):
                for local, layer in enumerate(here):
                    if layer not in layers:
                        continue
                    start = f"{before}{local}{between}"
                    if not part.per_expert:
                        yield LocalParam(chunk, start + after, part, (layer,), cut, False)
                        continue
                    for number, expert in enumerate(self.experts[rank.ep]):
                        yield LocalParam(
                            chunk, f"{start}{number}{after}", part, (layer, expert), cut, False
                        )

    def count(self, part: ParamPlan, rank: Rank) -> int:
        """How many parameters of this part the rank holds, copies of a tied embedding included."""
        last = len(self.stages) - 1
        if not part.mapping.is_per_layer:
            own = int(rank.pp == (0 if part.mapping.on_first_stage else last))
            return own + int(
                self.tied and part.mapping.megatron == _TIED[0] and rank.pp == last and last > 0
            )
        layers = frozenset(part.mapping.layers)
        here = sum(layer in layers for chunk in self.stages[rank.pp] for layer in chunk)
        return here * (len(self.experts[rank.ep]) if part.per_expert else 1)

    def read_bytes(self, rank: Rank) -> int:
        """Bytes that an import reads on this rank."""
        return sum(self.count(part, rank) * part.read_bytes(rank) for part in self.parts)

    def held_bytes(self, rank: Rank) -> int:
        """Bytes of this rank's parameters."""
        return sum(self.count(part, rank) * part.held_bytes(rank) for part in self.parts)

    def written_bytes(self) -> list[int]:
        """Bytes that an export writes, by rank: of the ranks that hold a parameter, `writer` names one."""
        per_stage = self.layout.ranks // self.layout.pp
        written = [0] * self.layout.ranks
        for order, part in enumerate(self.parts):
            nbytes = sum(
                math.prod(shape) * size
                for shape, size in zip(part.shapes, part.itemsizes, strict=True)
            )
            experts = part.mapping.experts or 1
            cutters = self.layout.expert_tp if part.per_expert else self.layout.tp
            dealt = self.layout.ep if part.per_expert else 1
            replicas = per_stage // (cutters * dealt)
            period = cutters * replicas  # of `writer`
            seconds = Counter(
                (expert * dealt // experts, expert % period) for expert in range(experts)
            )
            layers = frozenset(part.mapping.layers)
            for stage, chunks in enumerate(self.stages):
                here = [layer for chunk in chunks for layer in chunk if layer in layers]
                if not part.mapping.is_per_layer:
                    here = (
                        [0]
                        if stage == (0 if part.mapping.on_first_stage else len(self.stages) - 1)
                        else []
                    )
                firsts = Counter(ordinal_of(order, (layer,)) % period for layer in here)
                for (first, times), ((owner, second), each) in itertools.product(
                    firsts.items(), seconds.items()
                ):
                    cutter, replica = writer(first + second, cutters, replicas)
                    written[stage * per_stage + (replica * dealt + owner) * cutters + cutter] += (
                        times * each * nbytes
                    )
        return written

    @property
    def padding(self) -> int:
        """Elements of all parameters, each counted once over the ranks that cut it, that no tensor fills."""
        return sum(elements(box) for part in self.parts for cut in part.cuts for box in cut.padding)


def ordinal_of(order: int, numbers: tuple[int, ...]) -> int:
    """A number by which parameters are dealt to writers: of the row's place in the table, the layer and the expert."""
    return order + sum(numbers)


def writer(ordinal: int, cutters: int, replicas: int) -> tuple[int, int]:
    """Which of the ranks that cut a parameter, and which of its replicas, writes it."""
    return ordinal // replicas % cutters, ordinal % replicas


def _split(name: str) -> tuple[str, str, str]:
    """A name around its one or two stars."""
    before, _, rest = name.partition("*")
    between, star, after = rest.partition("*")
    return (before, between, after) if star else (before, rest, "")


def reshard_plan(
    model: ModelDescription,
    layout: Layout,
    *,
    vocab_rows: int | None = None,
    stages: tuple[tuple[tuple[int, ...], ...], ...] | None = None,
    grouped: bool = True,
) -> ReshardPlan:
    """Plan the copies between a model's Hugging Face tensors and its parameters at a layout.

    Args:
        model: The model.
        layout: The parallel layout.
        vocab_rows: Rows of the padded vocabulary over all TP ranks; None: the least multiple of tp.
        stages: The layers of each chunk of each pipeline rank; None: evenly distributed.
        grouped: Whether one module holds all experts of a rank (grouped GEMM).

    Raises:
        UnsupportedLayout: The layout does not divide an axis evenly.
    """
    config = model.config
    parts = tuple(
        _part(mapping, config.dims, layout, itemsize(config.dtype), vocab_rows)
        for mapping in model.mappings
    )
    each = config.num_experts // layout.ep
    dealt = tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(layout.ep))
    stages = stages or layout.stage_layers(config.num_layers)
    return ReshardPlan(layout, parts, stages, dealt, config.tied, grouped)


def check_layout(model_config: ModelConfig, layout: Layout) -> None:
    """Raise if a layout does not fit a model; nothing heavy is imported.

    Raises:
        UnsupportedLayout: See `Layout.check`.
    """
    layout.check(
        layers=model_config.num_layers,
        heads=model_config.num_heads,
        kv_heads=model_config.num_kv_heads,
        ffn=model_config.ffn_size,
        experts=model_config.num_experts,
        expert_ffn=model_config.expert_ffn_size,
    )


def _part(
    mapping: ParamMapping,
    dims: Mapping[str, int],
    layout: Layout,
    itemsize: int,
    vocab_rows: int | None,
) -> ParamPlan:
    shapes = tuple(tensor.shape(dims) for tensor in mapping.hf)
    ranks = (
        1 if mapping.kind in _CUT_BY_NOBODY else layout.expert_tp if mapping.experts else layout.tp
    )
    cuts = tuple(_cut(mapping, shapes, dims, rank, ranks, vocab_rows) for rank in range(ranks))
    return ParamPlan(
        mapping, shapes, tuple(4 if tensor.fp32 else itemsize for tensor in mapping.hf), cuts
    )


def _cut(
    mapping: ParamMapping,
    shapes: tuple[tuple[int, ...], ...],
    dims: Mapping[str, int],
    rank: int,
    ranks: int,
    vocab_rows: int | None,
) -> ShardSpec:
    first = shapes[0]
    match mapping.kind:
        case MappingKind.REPLICATED:
            return ShardSpec(first, (SliceCopy(0, _whole(first), _whole(first)),))
        case MappingKind.SQUEEZED:
            return ShardSpec(first[1:], (SliceCopy(0, _whole(first), _whole(first[1:])),))
        case MappingKind.ROW:
            here = _even(mapping, first[-1], ranks)
            shape = (*first[:-1], here)
            source = (*_whole(first[:-1]), (rank * here, (rank + 1) * here))
            return ShardSpec(shape, (SliceCopy(0, source, _whole(shape)),))
        case MappingKind.VOCAB:
            return _vocabulary(
                first, rank, _even(mapping, vocab_rows or -(-first[0] // ranks) * ranks, ranks)
            )
        case MappingKind.GATED | MappingKind.COLUMN:
            here = _even(mapping, first[0], ranks)
            pieces = [(tensor, rank * here, here) for tensor in range(len(shapes))]
        case MappingKind.QKV:
            pieces = _interleaved(shapes, dims["D"])
            here = _even(mapping, sum(shape[0] for shape in shapes), ranks)
            pieces = list(_window(pieces, rank * here, (rank + 1) * here))
    return _stacked(pieces, first[1:])


def _vocabulary(shape: tuple[int, ...], rank: int, here: int) -> ShardSpec:
    real = max(0, min(here, shape[0] - rank * here))
    others = _whole(shape[1:])
    copies = (
        (SliceCopy(0, ((rank * here, rank * here + real), *others), ((0, real), *others)),)
        if real
        else ()
    )
    return ShardSpec((here, *shape[1:]), copies, (((real, here), *others),) if real < here else ())


def _interleaved(shapes: tuple[tuple[int, ...], ...], head_dim: int) -> list[tuple[int, int, int]]:
    """(tensor, first row, rows) of q, k and v as Megatron-Core stacks them: by key-value group, its queries first."""
    groups = shapes[1][0] // head_dim
    return [
        (tensor, group * mappings, mappings)
        for group in range(groups)
        for tensor, mappings in enumerate(shape[0] // groups for shape in shapes)
    ]


def _window(
    pieces: Iterable[tuple[int, int, int]], begin: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """The pieces, or cuts of them, that lie at rows `begin` to `end` of their stack.

    Where tp exceeds the key-value heads a group is cut too (megatron/core/transformer/attention.py, SelfAttention: the
    projection is cut by rows whatever they are, and gathered again where it is used).
    """
    at = 0
    for tensor, first, mappings in pieces:
        low, high = max(begin, at), min(end, at + mappings)
        if low < high:
            yield tensor, first + low - at, high - low
        at += mappings


def _stacked(pieces: Iterable[tuple[int, int, int]], others: tuple[int, ...]) -> ShardSpec:
    copies, at = [], 0
    for tensor, first, mappings in pieces:
        copies.append(
            SliceCopy(
                tensor,
                ((first, first + mappings), *_whole(others)),
                ((at, at + mappings), *_whole(others)),
            )
        )
        at += mappings
    return ShardSpec((at, *others), tuple(copies))


def _whole(shape: tuple[int, ...]) -> Slice:
    return tuple((0, length) for length in shape)


def _even(mapping: ParamMapping, size: int, ranks: int) -> int:
    if size % ranks:
        option = "etp" if mapping.experts else "tp"
        wanted = f"a divisor of {size}, the length of {mapping.megatron} along the axis that is cut"
        raise UnsupportedLayout(
            option, got=ranks, wanted=wanted, remedy=f"choose another --{option}"
        )
    return size // ranks
