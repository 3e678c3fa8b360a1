"""The reshard plan: which slice of which Hugging Face tensor is which slice of which parameter.

It follows from the model's parameter mappings and a layout: no model is built, no tensor is read,
no torch is imported. A parameter is sharded in the same way in every layer and for every expert, so
a `ParamPlan` states its slices once, and `ReshardPlan` says which rank has which layers and
experts: a plan of 60,000 tensors is as small as one of 600. Loading and saving both follow it.
`validate.py` checks it, and shares no arithmetic with it.
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
    "num_elements",
    "reshard_plan",
    "writer_of",
    "writer_ordinal",
]

Slice = tuple[tuple[int, int], ...]  # (begin, end) along each axis

_TIED = ("embedding.word_embeddings.weight", "output_layer.weight")
_REPLICATED = (MappingKind.REPLICATED, MappingKind.SQUEEZED)


def num_elements(bounds: Slice) -> int:
    """Return the number of elements of a slice."""
    return math.prod(end - begin for begin, end in bounds)


class SliceCopy(NamedTuple):
    """A slice that both sides have; `tensor` is its index in the mapping's Hugging Face tensors."""

    tensor: int
    hf: Slice
    megatron: Slice


class ShardSpec(NamedTuple):
    """One TP rank's shard of a parameter: its shape, the slices that fill it, and its padding."""

    shape: tuple[int, ...]
    copies: tuple[SliceCopy, ...]
    padding: tuple[Slice, ...] = ()


class Rank(NamedTuple):
    """The pipeline stage, TP rank, EP rank and expert-TP rank of a process."""

    pp: int = 0
    tp: int = 0
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """A parameter mapping, and how its parameters are sharded.

    Attributes:
        shapes: Of the mapping's Hugging Face tensors.
        itemsizes: Bytes per element of each of them.
        shards: By TP rank (expert-TP rank for expert weights); one shard if replicated.
    """

    mapping: ParamMapping
    shapes: tuple[tuple[int, ...], ...]
    itemsizes: tuple[int, ...]
    shards: tuple[ShardSpec, ...]

    @property
    def is_expert(self) -> bool:
        """Whether these are weights of routed experts."""
        return self.mapping.experts > 0

    @property
    def hf_nbytes(self) -> int:
        """Bytes of the Hugging Face tensors of one parameter."""
        return sum(
            math.prod(shape) * size for shape, size in zip(self.shapes, self.itemsizes, strict=True)
        )

    def shard(self, rank: Rank) -> ShardSpec:
        """Return this rank's shard of each of the parameters."""
        return self.shards[(rank.etp if self.is_expert else rank.tp) % len(self.shards)]

    def read_bytes(self, rank: Rank) -> int:
        """Return the bytes of Hugging Face tensors that this rank reads for one parameter."""
        return sum(
            num_elements(copy.hf) * self.itemsizes[copy.tensor] for copy in self.shard(rank).copies
        )

    def local_bytes(self, rank: Rank) -> int:
        """Return the bytes of one parameter on this rank, padding included."""
        return math.prod(self.shard(rank).shape) * self.itemsizes[0]


class LocalParam(NamedTuple):
    """A parameter on one rank.

    Attributes:
        chunk: The model chunk of the rank that has it.
        name: Its name in that chunk.
        indices: (), (layer,) or (layer, expert), global and 0-based.
        shard: This rank's shard.
        is_tied_copy: Whether it is the last stage's copy of a tied embedding.
    """

    chunk: int
    name: str
    param: ParamPlan
    indices: tuple[int, ...]
    shard: ShardSpec
    is_tied_copy: bool


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """The copies between Hugging Face tensors and the parameters of every rank of a layout.

    Attributes:
        params: One for each parameter mapping.
        stages: The global 0-based layers of each chunk of each pipeline stage.
        experts: The global 0-based experts of each EP rank.
        tied: Whether the last of several stages has a copy of the embedding as its output layer.
        grouped: Whether one module has all experts of a rank (Transformer Engine's grouped GEMM),
            or each expert is a module.
    """

    layout: Layout
    params: tuple[ParamPlan, ...]
    stages: tuple[tuple[tuple[int, ...], ...], ...]
    experts: tuple[tuple[int, ...], ...]
    tied: bool
    grouped: bool

    def ranks(self) -> list[Rank]:
        """Return the ranks of the smallest world of this layout in Megatron-Core's order.

        TP is the fastest axis, PP the slowest.
        """
        tp, pp, ep, etp = self.layout.tp, self.layout.pp, self.layout.ep, self.layout.expert_tp
        stage_size = self.layout.ranks // pp
        return [
            Rank(pp=stage, tp=number % tp, ep=number // etp % ep, etp=number % etp)
            for stage in range(pp)
            for number in range(stage_size)
        ]

    def local_params(self, rank: Rank) -> Iterator[LocalParam]:
        """Yield the parameters of a rank: mapping by mapping, and chunk by chunk within one."""
        last = len(self.stages) - 1
        for param in self.params:
            shard = param.shard(rank)
            mapping = param.mapping
            name = mapping.megatron if self.grouped else mapping.alias or mapping.megatron
            if not mapping.is_per_layer:
                first = mapping.on_first_stage
                if rank.pp == (0 if first else last):
                    chunk = 0 if first else len(self.stages[last]) - 1
                    yield LocalParam(chunk, name, param, (), shard, False)
                if self.tied and mapping.megatron == _TIED[0] and rank.pp == last and last > 0:
                    chunk = len(self.stages[last]) - 1
                    yield LocalParam(chunk, _TIED[1], param, (), shard, True)
                continue
            before, between, after = _split(name)
            layers = frozenset(mapping.layers)
            for chunk, here in enumerate(self.stages[rank.pp]):
                for position, layer in enumerate(here):
                    if layer not in layers:
                        continue
                    start = f"{before}{position}{between}"
                    if not param.is_expert:
                        yield LocalParam(chunk, start + after, param, (layer,), shard, False)
                        continue
                    for number, expert in enumerate(self.experts[rank.ep]):
                        full_name = f"{start}{number}{after}"
                        yield LocalParam(chunk, full_name, param, (layer, expert), shard, False)

    def num_local(self, param: ParamPlan, rank: Rank) -> int:
        """Return how many of these parameters a rank has, a copy of a tied embedding included."""
        last = len(self.stages) - 1
        name = param.mapping.megatron
        if not param.mapping.is_per_layer:
            own = int(rank.pp == (0 if param.mapping.on_first_stage else last))
            return own + int(self.tied and name == _TIED[0] and rank.pp == last and last > 0)
        layers = frozenset(param.mapping.layers)
        here = sum(layer in layers for chunk in self.stages[rank.pp] for layer in chunk)
        return here * (len(self.experts[rank.ep]) if param.is_expert else 1)

    def read_bytes(self, rank: Rank) -> int:
        """Return the bytes that an import reads on this rank."""
        return sum(self.num_local(param, rank) * param.read_bytes(rank) for param in self.params)

    def local_bytes(self, rank: Rank) -> int:
        """Return the bytes of this rank's parameters."""
        return sum(self.num_local(param, rank) * param.local_bytes(rank) for param in self.params)

    def written_bytes(self) -> list[int]:
        """Return the bytes that an export writes on each rank: `writer_of` names one for each."""
        stage_size = self.layout.ranks // self.layout.pp
        written = [0] * self.layout.ranks
        for order, param in enumerate(self.params):
            num_experts = param.mapping.experts or 1
            num_shards = self.layout.expert_tp if param.is_expert else self.layout.tp
            ep = self.layout.ep if param.is_expert else 1
            num_replicas = stage_size // (num_shards * ep)
            period = num_shards * num_replicas  # of `writer_of`
            experts = Counter(
                (expert * ep // num_experts, expert % period) for expert in range(num_experts)
            )
            for stage in range(len(self.stages)):
                layers = Counter(
                    writer_ordinal(order, indices) % period
                    for indices in self._layers_on_stage(param, stage)
                )
                for (first, num_layers), ((ep_rank, second), each) in itertools.product(
                    layers.items(), experts.items()
                ):
                    shard, replica = writer_of(first + second, num_shards, num_replicas)
                    rank = stage * stage_size + (replica * ep + ep_rank) * num_shards + shard
                    written[rank] += num_layers * each * param.hf_nbytes
        return written

    def _layers_on_stage(self, param: ParamPlan, stage: int) -> list[tuple[int, ...]]:
        """Return the indices, less the expert, of the parameters that a stage has of a mapping."""
        if not param.mapping.is_per_layer:
            first = param.mapping.on_first_stage
            return [()] if stage == (0 if first else len(self.stages) - 1) else []
        layers = frozenset(param.mapping.layers)
        return [(layer,) for chunk in self.stages[stage] for layer in chunk if layer in layers]

    @property
    def padding(self) -> int:
        """Elements of all parameters that no tensor fills; replicas are counted once."""
        return sum(
            num_elements(bounds)
            for param in self.params
            for shard in param.shards
            for bounds in shard.padding
        )


def writer_ordinal(order: int, indices: tuple[int, ...]) -> int:
    """Return the number by which `writer_of` distributes parameters over the ranks.

    Args:
        order: Index of the parameter's mapping in the plan.
        indices: The layer and expert of the parameter.
    """
    return order + sum(indices)


def writer_of(ordinal: int, num_shards: int, num_replicas: int) -> tuple[int, int]:
    """Choose the rank that writes a parameter: round-robin over replicas, then over shards.

    Args:
        ordinal: See `writer_ordinal`.
        num_shards: Ranks that share one copy of the parameter.
        num_replicas: Copies of the parameter in the world.

    Returns:
        The index of the rank among those that share a copy, and the index of the copy.
    """
    return ordinal // num_replicas % num_shards, ordinal % num_replicas


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
        stages: The layers of each chunk of each pipeline stage; None: evenly distributed.
        grouped: See `ReshardPlan`.

    Raises:
        UnsupportedLayout: The layout does not divide an axis evenly.
    """
    config = model.config
    params = tuple(
        _param_plan(mapping, config.dims, layout, itemsize(config.dtype), vocab_rows)
        for mapping in model.mappings
    )
    per_rank = config.num_experts // layout.ep
    experts = tuple(
        tuple(range(rank * per_rank, (rank + 1) * per_rank)) for rank in range(layout.ep)
    )
    stages = stages or layout.stage_layers(config.num_layers)
    return ReshardPlan(layout, params, stages, experts, config.tied, grouped)


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


def _split(name: str) -> tuple[str, str, str]:
    """Split a name at its one or two stars."""
    before, _, rest = name.partition("*")
    between, star, after = rest.partition("*")
    return (before, between, after) if star else (before, rest, "")


def _param_plan(
    mapping: ParamMapping,
    dims: Mapping[str, int],
    layout: Layout,
    model_itemsize: int,
    vocab_rows: int | None,
) -> ParamPlan:
    shapes = tuple(tensor.shape(dims) for tensor in mapping.hf)
    if mapping.kind in _REPLICATED:
        num_shards = 1
    else:
        num_shards = layout.expert_tp if mapping.experts else layout.tp
    shards = tuple(
        _shard_spec(mapping, shapes, dims, rank, num_shards, vocab_rows)
        for rank in range(num_shards)
    )
    itemsizes = tuple(4 if tensor.fp32 else model_itemsize for tensor in mapping.hf)
    return ParamPlan(mapping, shapes, itemsizes, shards)


def _shard_spec(
    mapping: ParamMapping,
    shapes: tuple[tuple[int, ...], ...],
    dims: Mapping[str, int],
    rank: int,
    num_shards: int,
    vocab_rows: int | None,
) -> ShardSpec:
    first = shapes[0]
    match mapping.kind:
        case MappingKind.REPLICATED:
            return ShardSpec(first, (SliceCopy(0, _full(first), _full(first)),))
        case MappingKind.SQUEEZED:
            return ShardSpec(first[1:], (SliceCopy(0, _full(first), _full(first[1:])),))
        case MappingKind.ROW:
            size = _shard_size(mapping, first[-1], num_shards)
            shape = (*first[:-1], size)
            source = (*_full(first[:-1]), (rank * size, (rank + 1) * size))
            return ShardSpec(shape, (SliceCopy(0, source, _full(shape)),))
        case MappingKind.VOCAB:
            padded = vocab_rows or -(-first[0] // num_shards) * num_shards
            return _vocab_shard(first, rank, _shard_size(mapping, padded, num_shards))
        case MappingKind.GATED | MappingKind.COLUMN:
            size = _shard_size(mapping, first[0], num_shards)
            pieces = [(tensor, rank * size, size) for tensor in range(len(shapes))]
        case MappingKind.QKV:
            size = _shard_size(mapping, sum(shape[0] for shape in shapes), num_shards)
            pieces = list(_rows(_qkv_pieces(shapes, dims["D"]), rank * size, (rank + 1) * size))
    return _concatenated(pieces, first[1:])


def _vocab_shard(shape: tuple[int, ...], rank: int, size: int) -> ShardSpec:
    real = max(0, min(size, shape[0] - rank * size))
    others = _full(shape[1:])
    copies = (
        (SliceCopy(0, ((rank * size, rank * size + real), *others), ((0, real), *others)),)
        if real
        else ()
    )
    padding = (((real, size), *others),) if real < size else ()
    return ShardSpec((size, *shape[1:]), copies, padding)


def _qkv_pieces(shapes: tuple[tuple[int, ...], ...], head_dim: int) -> list[tuple[int, int, int]]:
    """Return (tensor, first row, rows) in Megatron-Core's order: Q, K, V of each KV group."""
    groups = shapes[1][0] // head_dim
    return [
        (tensor, group * rows, rows)
        for group in range(groups)
        for tensor, rows in enumerate(shape[0] // groups for shape in shapes)
    ]


def _rows(
    pieces: Iterable[tuple[int, int, int]], begin: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """Yield the pieces, or parts of them, at rows `begin` to `end` of their concatenation.

    Where tp exceeds the number of KV heads, a KV group is sharded too (SelfAttention in
    megatron/core/transformer/attention.py, 0.19.2: the projection's rows are sharded evenly
    whatever they are, and gathered again where they are used).
    """
    position = 0
    for tensor, first, rows in pieces:
        low, high = max(begin, position), min(end, position + rows)
        if low < high:
            yield tensor, first + low - position, high - low
        position += rows


def _concatenated(pieces: Iterable[tuple[int, int, int]], others: tuple[int, ...]) -> ShardSpec:
    copies, position = [], 0
    for tensor, first, rows in pieces:
        hf = ((first, first + rows), *_full(others))
        megatron = ((position, position + rows), *_full(others))
        copies.append(SliceCopy(tensor, hf, megatron))
        position += rows
    return ShardSpec((position, *others), tuple(copies))


def _full(shape: tuple[int, ...]) -> Slice:
    return tuple((0, length) for length in shape)


def _shard_size(mapping: ParamMapping, length: int, num_shards: int) -> int:
    if length % num_shards:
        option = "etp" if mapping.experts else "tp"
        raise UnsupportedLayout(
            option,
            got=num_shards,
            wanted=f"a divisor of {length}, the length of the sharded axis of {mapping.megatron}",
            remedy=f"choose another --{option}",
        )
    return length // num_shards
