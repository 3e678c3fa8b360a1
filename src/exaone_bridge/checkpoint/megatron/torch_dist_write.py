"""Writes a checkpoint as Megatron-Core's `torch_dist` strategy does, but without a model.

Each parameter is one chunk, as one rank without any parallelism would write it; Megatron-Core
shards it for the layout that loads it. Keys and shapes are those of Megatron-Bridge's own
checkpoints (`torch_dist.py`).
"""

from __future__ import annotations

import io
import math
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

from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES, byte_view
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.megatron.torch_dist import key_of
from exaone_bridge.checkpoint.reshard.plan import ParamPlan, ReshardPlan
from exaone_bridge.checkpoint.staging import flush_file

__all__ = ["Parameter", "WrittenParam", "parameters_of", "write_metadata", "write_parameters"]

_COMMON = "common_state"
# Modules without an extra state: those of the vocabulary, the router (neither a linear nor a norm)
# and Transformers' vision encoder.
_NO_EXTRA_STATE = ("embedding.word_embeddings.", "output_layer.", ".mlp.router.")


class Parameter(NamedTuple):
    """A parameter, and where it is stored.

    Attributes:
        names: Of its Hugging Face tensors.
        key: The stored tensor.
        lead: The parameter's indices along the leading axes of `key`.
        outer: The lengths of those axes.
    """

    param: ParamPlan
    names: tuple[str, ...]
    key: str
    lead: tuple[int, ...]
    outer: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter."""
        shape = self.param.shards[0].shape
        return math.prod(shape) * self.param.itemsizes[0]

    @property
    def extra_state(self) -> str | None:
        """The key of the module's extra state, which both backends' linears and norms expect."""
        if self.key.startswith("visual.") or any(name in self.key for name in _NO_EXTRA_STATE):
            return None
        at, of = (self.lead, self.outer) if self.lead else ((0,), (1,))
        here, total = (".".join(map(str, numbers)) for numbers in (at, of))
        return f"{self.key.rpartition('.')[0]}._extra_state/shard_{here}_{total}"


class WrittenParam(NamedTuple):
    """Where a parameter was written.

    Attributes:
        number: Its index in the result of `parameters_of`.
        offset: First byte in the file.
        length: Bytes.
    """

    number: int
    file: str
    offset: int
    length: int


def parameters_of(plan: ReshardPlan, layers: int, *, stacked: bool) -> list[Parameter]:
    """List every parameter of an unsharded model.

    Args:
        plan: At `Layout()`.
        layers: Number of layers of the model.
        stacked: Whether all layers of a parameter are one stored tensor.
    """
    found = []
    for param in plan.params:
        for numbers, (_, *names) in zip(
            param.mapping.numbers(), param.mapping.names(), strict=True
        ):
            key, lead = key_of(param.mapping, numbers, stacked=stacked)
            sizes = (layers, param.mapping.experts) if stacked else (param.mapping.experts,)
            found.append(Parameter(param, tuple(names), key, lead, sizes[: len(lead)]))
    return found


def write_parameters(
    parameters: list[Parameter], mine: Iterable[int], source: HFCheckpoint, path: Path
) -> Iterator[tuple[WrittenParam, int]]:
    """Write parameters to one file, each read straight from the source's files.

    Args:
        parameters: All parameters.
        mine: Indices of those to write.
        source: Has their tensors.
        path: The file.

    Yields:
        Where each parameter was written, and its bytes.

    Raises:
        CheckpointError: A file of the source has changed since its header was read.
    """
    with path.open("wb") as file:
        for number in mine:
            tensor = _read(parameters[number], source)
            begin = file.tell()
            torch.save(tensor, file)
            yield WrittenParam(number, path.name, begin, file.tell() - begin), tensor.nbytes
            del tensor
        file.flush()
        flush_file(file.fileno())


def _read(parameter: Parameter, source: HFCheckpoint) -> torch.Tensor:
    """Read a parameter, with leading axes of one: rows of its tensors go from file to place."""
    shard = parameter.param.shards[0]
    dtype = TORCH_DTYPES[source.tensors[parameter.names[0]].dtype]
    result = torch.empty((1,) * len(parameter.lead) + shard.shape, dtype=dtype)
    data = byte_view(result)  # one view for all rows: those of a slice would take longer than it
    row_bytes = result.nbytes // shard.shape[0]
    for copy in shard.copies:  # full rows, because the parameter is not sharded
        first_hf = copy.hf[len(copy.hf) - len(copy.megatron)][0]
        begin, end = copy.megatron[0]
        rows = data[begin * row_bytes : end * row_bytes]
        source.read_into(parameter.names[copy.tensor], rows, first_hf * row_bytes)
    return result


def write_metadata(
    folder: Path,
    parameters: list[Parameter],
    tensors: Mapping[str, TensorInfo],
    written: Iterable[WrittenParam],
) -> None:
    """Write `.metadata`, and a file with the common state and one empty extra state for all.

    Args:
        folder: Of the iteration.
        parameters: All parameters.
        tensors: The Hugging Face tensors, whose dtypes the parameters have.
        written: Where each parameter is.
    """
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for where in sorted(written):
        parameter = parameters[where.number]
        name = parameter.names[0]
        entry = state.get(parameter.key)
        if entry is None:
            properties = TensorProperties(dtype=TORCH_DTYPES[tensors[name].dtype])
            shape = torch.Size(parameter.outer + parameter.param.shards[0].shape)
            entry = state[parameter.key] = TensorStorageMetadata(
                properties=properties, size=shape, chunks=[]
            )
        assert isinstance(entry, TensorStorageMetadata)
        shape = parameter.param.shards[0].shape
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
