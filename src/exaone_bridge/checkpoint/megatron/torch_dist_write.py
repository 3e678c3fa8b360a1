"""Writes what Megatron-Core's `torch_dist` strategy writes, a parameter at a time, without a model.

Each parameter is one chunk, as one rank without any parallelism would write it; Megatron-Core cuts it for whichever
layout loads it. Names and shapes are those of a checkpoint that the host wrote (`torch_dist.py`).
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.megatron.torch_dist import key_of
from exaone_bridge.checkpoint.reshard.plan import ParamPlan, ReshardPlan

__all__ = ["Parameter", "WrittenParam", "parameters_of", "write_metadata", "write_parameters"]

_COMMON = "common_state"
# Their classes keep nothing of their own (vocabulary), or are no linear and no norm (router); nor does Transformers'
# tower.
_NO_EXTRA_STATE = ("embedding.word_embeddings.", "output_layer.", ".mlp.router.")


class Parameter(NamedTuple):
    """One parameter: its key, where it lies along the leading axes, and their lengths."""

    part: ParamPlan
    names: tuple[str, ...]  # of its tensors
    key: str
    lead: tuple[int, ...]
    outer: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        shape = self.part.shards[0].shape
        return torch.Size(shape).numel() * self.part.itemsizes[0]

    @property
    def extra_state(self) -> str | None:
        """The key of its module's extra state, which both backends' linears and norms look for."""
        if self.key.startswith("visual.") or any(name in self.key for name in _NO_EXTRA_STATE):
            return None
        at, of = (self.lead, self.outer) if self.lead else ((0,), (1,))
        here, total = (".".join(map(str, numbers)) for numbers in (at, of))
        return f"{self.key.rpartition('.')[0]}._extra_state/shard_{here}_{total}"


class WrittenParam(NamedTuple):
    """Where a parameter was written to."""

    number: int  # in `parameters_of`
    file: str
    offset: int
    length: int


def parameters_of(plan: ReshardPlan, layers: int, *, stacked: bool) -> list[Parameter]:
    """Every parameter of a model that nobody cuts.

    Args:
        plan: at `Layout()`.
        layers: how many the model has.
        stacked: whether all layers of a parameter lie in one tensor.
    """
    found = []
    for part in plan.params:
        for numbers, (_, *names) in zip(part.mapping.numbers(), part.mapping.names(), strict=True):
            key, lead = key_of(part.mapping, numbers, stacked=stacked)
            sizes = (layers, part.mapping.experts) if stacked else (part.mapping.experts,)
            found.append(Parameter(part, tuple(names), key, lead, sizes[: len(lead)]))
    return found


def write_parameters(
    parameters: list[Parameter], mine: Iterable[int], source: HFCheckpoint, path: Path
) -> Iterator[tuple[WrittenParam, int]]:
    """Write these parameters to one file, each read straight from the source's files; what was written, and its bytes.

    Raises:
        CheckpointError: a file of the source has become shorter since its header was read.
    """
    with path.open("wb") as file:
        for number in mine:
            tensor = _read(parameters[number], source)
            begin = file.tell()
            torch.save(tensor, file)
            yield WrittenParam(number, path.name, begin, file.tell() - begin), tensor.nbytes
            del tensor
        file.flush()
        os.fsync(file.fileno())


def _read(parameter: Parameter, source: HFCheckpoint) -> torch.Tensor:
    """Read a parameter, with leading axes of one: rows of its tensors go from file to place."""
    cut = parameter.part.shards[0]
    dtype = TORCH_DTYPES[source.tensors[parameter.names[0]].dtype]
    result = torch.empty((1,) * len(parameter.lead) + cut.shape, dtype=dtype)
    rows = result.view(cut.shape)
    row_bytes = result.nbytes // cut.shape[0]
    for copy in cut.copies:  # whole rows, because the parameter is not sharded
        first_hf = copy.hf[len(copy.hf) - len(copy.megatron)][0]
        begin, end = copy.megatron[0]
        source.read_into(parameter.names[copy.tensor], rows[begin:end], first_hf * row_bytes)
    return result


def write_metadata(
    folder: Path,
    parameters: list[Parameter],
    tensors: Mapping[str, TensorInfo],
    written: Iterable[WrittenParam],
) -> None:
    """Write `.metadata`, and the file with what is no tensor: the common state, and one empty extra state for all."""
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for where in sorted(written):
        parameter = parameters[where.number]
        name = parameter.names[0]
        entry = state.get(parameter.key)
        if entry is None:
            properties = TensorProperties(dtype=TORCH_DTYPES[tensors[name].dtype])
            shape = torch.Size(parameter.outer + parameter.part.shards[0].shape)
            entry = state[parameter.key] = TensorStorageMetadata(
                properties=properties, size=shape, chunks=[]
            )
        assert isinstance(entry, TensorStorageMetadata)
        shape = parameter.part.shards[0].shape
        offsets = torch.Size(parameter.lead + (0,) * len(shape))
        entry.chunks.append(
            ChunkStorageMetadata(offsets, torch.Size((1,) * len(parameter.lead) + shape))
        )
        storage[MetadataIndex(parameter.key, offsets)] = _StorageInfo(
            where.file, where.offset, where.length
        )
    empty = sorted({parameter.extra_state for parameter in parameters} - {None})  # type: ignore[type-var]
    common = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    blobs = io.BytesIO()
    for keys, value in (([f"{_COMMON}/shard_0_1"], common), (empty, None)):
        begin = blobs.tell()
        torch.save([value], blobs)
        for key in keys:
            state[str(key)] = BytesStorageMetadata()
            storage[MetadataIndex(str(key))] = _StorageInfo(
                "__objects.distcp", begin, blobs.tell() - begin
            )
    (folder / "__objects.distcp").write_bytes(blobs.getvalue())
    metadata = Metadata(
        state_dict_metadata=state,
        storage_data=storage,
        storage_meta=StorageMeta(checkpoint_id=str(folder)),
    )
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
