"""Loads a Hugging Face folder into the Megatron-Core model of a rank by the reshard plan.

It runs on every rank of a world that is up, on the model that Megatron-Bridge built, without any
collective: each rank reads its own slices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from exaone_bridge.checkpoint.coverage import BUILD_FROM_CONFIG, check_coverage
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint, check_shape
from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.reshard.plan import LocalParam, Rank, ReshardPlan, reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["LoadStats", "LocalModel", "fill_params", "load_weights", "match_params", "plan_local"]

_MAX_THREADS = 8
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODEL = "Megatron-Core model"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The model of one rank.

    Attributes:
        layout: The layout of the world.
        rank: This process in it.
        layers: The global 0-based layers of each model chunk of this rank.
        even_pipeline: Whether layers are distributed evenly over the stages, so that the layers of
            all other ranks are known.
        parameters: (chunk, name in it) -> parameter or persistent buffer.
    """

    layout: Layout
    rank: Rank
    layers: tuple[tuple[int, ...], ...]
    even_pipeline: bool
    parameters: Mapping[tuple[int, str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What one rank loaded, counted while it was copied.

    Attributes:
        num_params: Parameters that were filled.
        nbytes: Bytes of Hugging Face tensors that were read.
        sharded_nbytes: Those of `nbytes` that belong to sharded parameters.
    """

    num_params: int
    nbytes: int
    sharded_nbytes: int


def plan_local(model: ModelDescription, local: LocalModel) -> ReshardPlan:
    """Plan the copies for the model of this rank.

    With an uneven pipeline, the plan has the layers of this rank's stage only.

    Raises:
        UnsupportedLayout: The layout does not divide an axis evenly.
    """
    layout = local.layout
    stages = layout.stage_layers(model.config.num_layers)
    if not local.even_pipeline:
        stages = tuple(local.layers if stage == local.rank.pp else () for stage in range(layout.pp))
    vocab_keys = [
        (0, "embedding.word_embeddings.weight"),
        (len(local.layers) - 1, "output_layer.weight"),
    ]
    if model.config.head is not None:
        vocab_keys.pop()  # a head has a row for each label
    vocab_rows = next(
        (
            local.parameters[key].shape[0] * layout.tp
            for key in vocab_keys
            if key in local.parameters
        ),
        None,
    )
    return reshard_plan(
        model,
        layout,
        vocab_rows=vocab_rows,
        stages=stages,
        grouped=not any(".local_experts." in name for _, name in local.parameters),
    )


def match_params(plan: ReshardPlan, local: LocalModel) -> list[tuple[LocalParam, torch.Tensor]]:
    """Find the parameters of this rank's model in the plan, and check that both have the same.

    Returns:
        Each planned parameter of this rank with its tensor `[*shard.shape]`.

    Raises:
        UnmappedTensors: Keys are missing, or there are unexpected keys.
        CheckpointError: A parameter has another shape than the config gives it.
    """
    planned = {(param.chunk, param.name): param for param in plan.local_params(local.rank)}
    check_coverage(
        [_global_name(param) for key, param in planned.items() if key not in local.parameters],
        [
            _with_global_layer(name, local.layers[chunk])
            for chunk, name in local.parameters
            if (chunk, name) not in planned
        ],
        where=_MODEL,
        remedy=BUILD_FROM_CONFIG,
    )
    for key, param in planned.items():
        if (shape := tuple(local.parameters[key].shape)) != param.shard.shape:
            raise CheckpointError(
                _MODEL,
                f"{_global_name(param)} has shape {list(shape)}, "
                f"and the config makes it {list(param.shard.shape)}",
                remedy=BUILD_FROM_CONFIG,
            )
    return [(param, local.parameters[key]) for key, param in planned.items()]


def _global_name(local: LocalParam) -> str:
    name = local.name if local.is_tied_copy else local.param.mapping.megatron
    for index in local.indices:
        name = name.replace("*", str(index), 1)
    return name


def _with_global_layer(name: str, layers: tuple[int, ...]) -> str:
    """Replace the layer's number in its chunk by its global number."""
    before, dot, rest = name.partition(".layers.")
    number, _, after = rest.partition(".")
    if not dot or not number.isdigit() or int(number) >= len(layers):
        return name
    return f"{before}.layers.{layers[int(number)]}.{after}"


def load_weights(source: HFCheckpoint, model: ModelDescription, local: LocalModel) -> LoadStats:
    """Copy this rank's slices from a folder's files straight into its parameters.

    No collective is involved: a rank that raises does so alone.

    Raises:
        UnmappedTensors: Keys are missing, or there are unexpected keys, on either side.
        CheckpointError: A file is damaged, or a tensor or parameter has another shape than the
            config gives it.
        UnsupportedLayout: The layout does not divide an axis evenly.
        PlanError: The plan is not a bijection.
    """
    plan = plan_local(model, local)
    if local.even_pipeline and (wanted := plan.stages[local.rank.pp]) != local.layers:
        raise CheckpointError(
            _MODEL,
            f"stage {local.rank.pp} has the layers {local.layers}, and should have {wanted}",
            remedy=BUILD_FROM_CONFIG,
        )
    params = match_params(plan, local)
    tensors = source.model_tensors
    check_coverage(model.hf_shapes, tensors, where=source.folder)
    for name, shape in model.hf_shapes.items():
        check_shape(tensors[name], shape)
    if local.even_pipeline:
        validate_plan(plan, {name: info.shape for name, info in tensors.items()})
    stats: LoadStats = fill_params(params, tensors)
    return stats


@torch.no_grad()
def fill_params(
    params: list[tuple[LocalParam, torch.Tensor]], tensors: Mapping[str, TensorInfo]
) -> LoadStats:
    """Copy every slice from its file to its parameter, in the parameter's dtype; padding is zero.

    Copies run on this rank's share of the machine's cores, the largest parameters first.

    Args:
        params: Each planned parameter with its tensor `[*shard.shape]`.
        tensors: Where the Hugging Face tensors lie.
    """
    params = sorted(params, key=lambda pair: -pair[1].numel())
    with TensorReader() as reader, ThreadPoolExecutor(_num_threads()) as pool:
        sizes = list(pool.map(lambda pair: _fill_one(pair[0], pair[1], tensors, reader), params))
    return LoadStats(
        len(params),
        sum(sizes),
        sum(
            nbytes
            for nbytes, (local, _) in zip(sizes, params, strict=True)
            if len(local.param.shards) > 1
        ),
    )


def _num_threads() -> int:
    """Return this machine's cores per rank of it, up to what its memory bandwidth supports."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
    return max(1, min(_MAX_THREADS, cores // ranks))


def _fill_one(
    local: LocalParam,
    parameter: torch.Tensor,
    tensors: Mapping[str, TensorInfo],
    reader: TensorReader,
) -> int:
    """Fill one parameter, and return how many bytes were read."""
    infos = [tensors[hf.numbered(*local.indices).name] for hf in local.param.mapping.hf]
    views = [reader.view(info) for info in infos]
    nbytes = 0
    with torch.no_grad():  # a setting per thread
        for copy in local.shard.copies:
            source = views[copy.tensor][tuple(slice(begin, end) for begin, end in copy.hf)]
            target = parameter[tuple(slice(begin, end) for begin, end in copy.megatron)]
            nbytes += source.nbytes
            if (
                source.is_contiguous()
                and target.is_contiguous()
                and _is_bitwise_copy(target, source)
            ):
                begin = source.storage_offset() * source.itemsize
                reader.read_into(infos[copy.tensor], target, begin)
            else:
                _copy(target, source.view(target.shape) if source.dim() != target.dim() else source)
        for bounds in local.shard.padding:
            parameter[tuple(slice(begin, end) for begin, end in bounds)].zero_()
    del views
    for info in infos:
        reader.release(info)
    return nbytes


def _is_bitwise_copy(target: torch.Tensor, source: torch.Tensor) -> bool:
    same_dtype: bool = target.device.type == "cpu" and target.dtype == source.dtype
    return same_dtype and target.numel() > 0 and target.dim() > 0


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if _is_bitwise_copy(target, source):
        bits = _INT_OF_SIZE[target.element_size()]  # NumPy has no bfloat16
        # NumPy copies on the calling thread; torch would split each copy over its own threads,
        # while all of this pool are busy.
        np.copyto(target.detach().view(bits).numpy(), source.view(bits).numpy())
    else:
        target.copy_(source)
