"""What the host's calls ask of the conversion engine; `bridge/eligibility.py` finds it by name, because it stands above it.

Both run on every rank of a world that is up, on the model that the host built.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from exaone_bridge.checkpoint.coverage import BUILD_FROM_CONFIG, check_coverage
from exaone_bridge.checkpoint.hf.checkpoint import check_shape
from exaone_bridge.checkpoint.hf.headers import TensorInfo, read_headers
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.reshard.plan import (
    LocalParam,
    Rank,
    ReshardPlan,
    reshard_plan,
)
from exaone_bridge.checkpoint.reshard.validate import prove
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["LoadStats", "LocalModel", "copying_threads", "fill", "load"]

_MOST_THREADS = 8
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class LocalModel:
    """This rank's place in a world, and what it holds.

    Attributes:
        layers: the global 0-based layers of each chunk here.
        even: whether the pipeline is cut evenly, so that every rank knows what all others hold.
        parameters: by chunk and name in it; persistent buffers too.
    """

    layout: Layout
    pp: int
    tp: int
    ep: int
    etp: int
    layers: tuple[tuple[int, ...], ...]
    even: bool
    parameters: Mapping[tuple[int, str], torch.Tensor]

    @property
    def rank(self) -> Rank:
        """As the plan counts."""
        return Rank(pp=self.pp, tp=self.tp, ep=self.ep, etp=self.etp)


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What one rank copied, counted as it was copied: bytes of files' tensors, and of those that ranks cut."""

    parameters: int
    nbytes: int
    cut_nbytes: int


def plan_here(model: ModelDescription, placed: LocalModel) -> ReshardPlan:
    """The plan of the model at hand.

    Raises:
        UnsupportedLayout: an axis that the layout does not cut evenly.
    """
    layout = placed.layout
    stages = layout.stage_layers(model.config.num_layers)
    if not placed.even:  # of other stages nothing is known here
        stages = tuple(placed.layers if stage == placed.pp else () for stage in range(layout.pp))
    words = (0, "embedding.word_embeddings.weight"), (len(placed.layers) - 1, "output_layer.weight")
    here = next(
        (placed.parameters[key].shape[0] for key in words if key in placed.parameters), None
    )
    return reshard_plan(
        model,
        layout,
        vocab_rows=None if here is None else here * layout.tp,
        stages=stages,
        grouped=not any(".local_experts." in name for _, name in placed.parameters),
    )


def matched(plan: ReshardPlan, placed: LocalModel) -> list[tuple[LocalParam, torch.Tensor]]:
    """Each parameter of this rank with its place in the plan; neither side has one that the other lacks.

    Raises:
        UnmappedTensors: a parameter without a row, or a row without its parameter.
        CheckpointError: a parameter of another shape.
    """
    where = "Megatron-Core model"
    wanted = {(held.chunk, held.name): held for held in plan.held(placed.rank)}
    check_coverage(
        [_named(held) for key, held in wanted.items() if key not in placed.parameters],
        [
            _global(name, placed.layers[chunk])
            for chunk, name in placed.parameters
            if (chunk, name) not in wanted
        ],
        where=where,
        remedy=BUILD_FROM_CONFIG,
    )
    for key, held in wanted.items():
        if (shape := tuple(placed.parameters[key].shape)) != held.cut.shape:
            problem = f"{_named(held)} has shape {list(shape)}, and the configuration makes it {list(held.cut.shape)}"
            raise CheckpointError(where, problem, remedy=BUILD_FROM_CONFIG)
    return [(held, placed.parameters[key]) for key, held in wanted.items()]


def _named(held: LocalParam) -> str:
    """The parameter's global name."""
    name = held.name if held.replica else held.part.mapping.megatron
    for number in held.numbers:
        name = name.replace("*", str(number), 1)
    return name


def _global(name: str, layers: tuple[int, ...]) -> str:
    before, dot, rest = name.partition(".layers.")
    number, _, after = rest.partition(".")
    if not dot or not number.isdigit() or int(number) >= len(layers):
        return name
    return f"{before}.layers.{layers[int(number)]}.{after}"


def load(folder: Path, model: ModelDescription, placed: LocalModel) -> LoadStats:
    """Copy this rank's slices from a folder's files straight into its parameters; no rank waits for another.

    Raises:
        UnmappedTensors: a tensor that no row claims, one that a row claims and the folder lacks; or see `matched`.
        CheckpointError: files that are damaged, or tensors of another shape than the configuration says.
        UnsupportedLayout, PlanError: the model cannot be cut so.
    """
    plan = plan_here(model, placed)
    if placed.even and plan.stages[placed.pp] != placed.layers:
        raise CheckpointError(
            "Megatron-Core model",
            f"stage {placed.pp} has the layers {placed.layers}, and should have {plan.stages[placed.pp]}",
            remedy=BUILD_FROM_CONFIG,
        )
    parameters = matched(plan, placed)
    tensors = {
        name: info for name, info in read_headers(folder).items() if not model.is_passthrough(name)
    }
    check_coverage(model.hf_shapes, tensors, where=folder)
    for name, shape in model.hf_shapes.items():
        check_shape(tensors[name], shape)
    if placed.even:
        prove(plan, {name: info.shape for name, info in tensors.items()})
    return fill(parameters, tensors)


@torch.no_grad()
def fill(
    parameters: list[tuple[LocalParam, torch.Tensor]], tensors: Mapping[str, TensorInfo]
) -> LoadStats:
    """Copy every slice of every parameter from its file, in the parameter's own type; padding is zero.

    Copies run on this rank's share of the machine's cores, the largest parameters first.
    """
    parameters = sorted(parameters, key=lambda pair: -pair[1].numel())
    with TensorReader() as reader, ThreadPoolExecutor(copying_threads()) as pool:
        moved = list(
            pool.map(lambda pair: _fill_one(pair[0], pair[1], tensors, reader), parameters)
        )
    return LoadStats(
        len(parameters),
        sum(nbytes for nbytes, _ in moved),
        sum(nbytes for nbytes, cut in moved if cut),
    )


def copying_threads() -> int:
    """Cores of this machine for each of its ranks, and no more than memory keeps up with."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    ranks = int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or (dist.get_world_size() if dist.is_initialized() else 1)
    )
    return max(1, min(_MOST_THREADS, cores // ranks))


def _fill_one(
    held: LocalParam,
    parameter: torch.Tensor,
    tensors: Mapping[str, TensorInfo],
    reader: TensorReader,
) -> tuple[int, bool]:
    """Bytes that were read, and whether the parameter is one that ranks cut."""
    infos = [tensors[tensor.numbered(*held.numbers).name] for tensor in held.part.mapping.hf]
    views = [reader.view(info) for info in infos]
    nbytes = 0
    with torch.no_grad():  # a thread's own setting
        for copy in held.cut.copies:
            source = views[copy.tensor][tuple(slice(begin, end) for begin, end in copy.hf)]
            target = parameter[tuple(slice(begin, end) for begin, end in copy.megatron)]
            nbytes += source.nbytes
            if source.is_contiguous() and target.is_contiguous() and _same_bits(target, source):
                begin = source.storage_offset() * source.itemsize
                reader.read_into(infos[copy.tensor], target, begin)
            else:
                _copy(target, source.view(target.shape) if source.dim() != target.dim() else source)
        for box in held.cut.padding:
            parameter[tuple(slice(begin, end) for begin, end in box)].zero_()
    del views
    for info in infos:
        reader.release(info)
    return nbytes, len(held.part.cuts) > 1


def _same_bits(target: torch.Tensor, source: torch.Tensor) -> bool:
    return (
        target.device.type == "cpu"
        and target.dtype == source.dtype
        and target.numel() > 0
        and target.dim() > 0
    )


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if _same_bits(target, source):
        bits = _BITS[target.element_size()]  # NumPy has no bfloat16
        # NumPy copies on the thread that asks; torch would share each copy out among its own, which are all busy.
        np.copyto(target.detach().view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source)
