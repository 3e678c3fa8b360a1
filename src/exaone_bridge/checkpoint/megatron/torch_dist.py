"""Reads Megatron-Core's distributed checkpoints (`torch_dist`) without Megatron-Core.

The format is that of torch.distributed.checkpoint: `.metadata` says which file has which chunk of
which tensor, and each chunk is what `torch.save` wrote. Tensors are named by Megatron-Core
(`megatron/core/dist_checkpointing/strategies/torch.py`, 0.19.2): a layer's by its number, or all
layers are one tensor with a leading axis; experts are along a further leading axis.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from exaone_bridge.checkpoint.reshard.plan import Slice
from exaone_bridge.checkpoint.reshard.validate import validate_cover
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.param_mapping import ParamMapping

__all__ = ["StoredTensor", "TorchDist", "key_of"]

_RESTORE = "restore the missing or truncated files"
# The classes of a `.metadata` pickle; any other could run code while it is read.
_MEGATRON_CORE = "megatron.core.dist_checkpointing.strategies.torch"
_SAFE = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "slice"},
}


def key_of(
    mapping: ParamMapping, numbers: tuple[int, ...], *, stacked: bool
) -> tuple[str, tuple[int, ...]]:
    """Return the key of a parameter in a checkpoint, and its indices along the leading axes.

    Args:
        mapping: The parameter mapping.
        numbers: (), (layer,) or (layer, expert).
        stacked: Whether all layers are in one tensor.
    """
    name, where = mapping.megatron, numbers
    if mapping.experts:  # all experts of a layer are one tensor, for every class of experts
        name = name.removesuffix("*").replace(".mlp.experts.", ".mlp.experts.experts.")
    # Multi-token prediction has an older name (`MultiTokenPredictionLayer.sharded_state_dict`).
    if not numbers:
        return name.replace(".mtp_model_layer.", ".transformer_layer."), ()
    if stacked:
        return name.replace(".*", "", 1), where
    return name.replace("*", str(numbers[0]), 1), where[1:]


class _MegatronCoreClass(Metadata):  # type: ignore[misc]
    """Takes the place of Megatron-Core's classes, which hold no tensor and take 10 s to import."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == _MEGATRON_CORE and name in ("MCoreMetadata", "MCoreSavePlan"):
            return _MegatronCoreClass
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")


@dataclass(frozen=True, slots=True)
class _Chunk:
    bounds: Slice
    file: str
    offset: int  # bytes from the start of the file
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The dtype, shape and chunks of a tensor in a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


class _FilePart(io.RawIOBase):
    """A part of a file as a file of its own, for torch.load."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        # torch.load takes a short read for a damaged file, and Linux reads at most 2 GiB at once.
        left = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        begin = self._at
        self._file.seek(self._offset + self._at)
        while left and (count := self._file.readinto(left)):  # type: ignore[attr-defined]
            left, self._at = left[count:], self._at + count
        return self._at - begin


class TorchDist:
    """The tensors of a checkpoint, read chunk by chunk, without optimizer and extra states.

    Attributes:
        tensors: key -> dtype, shape and chunks.
        optimizer: how many tensors the optimizer's state has, and their bytes.

    The chunks of the last parameter stay in memory, because Q, K and V are read one by one from it.

    Raises:
        CheckpointError: There is no checkpoint, or its metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            self.tensors: Mapping[str, StoredTensor] = dict(_tensors(metadata))
            self.optimizer = _optimizer_state(metadata)
        except FileNotFoundError as error:
            raise CheckpointError(
                path,
                "the checkpoint's metadata is missing",
                remedy="name a folder that `import` wrote",
            ) from error
        except Exception as error:  # pickle raises anything for a damaged file
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(
                path, f"cannot be read ({text})", remedy="restore the checkpoint"
            ) from error
        self._cached: tuple[object, dict[_Chunk, torch.Tensor]] = (None, {})
        # Chunks by parameter, of the tensors whose chunks cover each element once.
        self._by_lead: dict[str, dict[tuple[int, ...], list[_Chunk]]] = {}

    def read_into(
        self, target: torch.Tensor, key: str, lead: tuple[int, ...], bounds: Slice
    ) -> None:
        """Copy a slice of a parameter, converted to the target's dtype.

        Args:
            target: [end - begin of each axis of `bounds`].
            key: The stored tensor, which may have the parameters of all layers and experts.
            lead: The parameter's indices along the leading axes of `key`.
            bounds: The slice along all axes of `key`.

        Raises:
            CheckpointError: A chunk is missing or damaged, or the chunks do not cover the tensor.
        """
        stored = self.tensors[key]
        if self._cached[0] != (key, lead):
            self._cached = ((key, lead), {})
        if key not in self._by_lead:
            validate_cover(
                stored.shape, [chunk.bounds for chunk in stored.chunks], self._fault(key)
            )
            self._by_lead[key] = {}
        for chunk in self._near(key, lead):
            meet = [
                (max(b, cb), min(e, ce))
                for (b, e), (cb, ce) in zip(bounds, chunk.bounds, strict=True)
            ]
            if any(b >= e for b, e in meet):
                continue
            source = self._chunk(key, chunk)
            there = source[
                tuple(
                    slice(b - cb, e - cb)
                    for (b, e), (cb, _) in zip(meet, chunk.bounds, strict=True)
                )
            ]
            here = target[
                tuple(slice(b - tb, e - tb) for (b, e), (tb, _) in zip(meet, bounds, strict=True))
            ]
            here.copy_(there)

    def _near(self, key: str, lead: tuple[int, ...]) -> list[_Chunk]:
        """Return a parameter's chunks, of the hundreds that a tensor of all experts may have."""
        found = self._by_lead[key]
        if not found:
            for chunk in self.tensors[key].chunks:
                for place in itertools.product(
                    *(range(begin, end) for begin, end in chunk.bounds[: len(lead)])
                ):
                    found.setdefault(place, []).append(chunk)
        return found[lead]

    def _fault(self, key: str) -> Callable[[Slice, str], CheckpointError]:
        return lambda bounds, fault: CheckpointError(
            self.folder, f"in {key} {bounds} {fault}", remedy=_RESTORE
        )

    def _chunk(self, key: str, chunk: _Chunk) -> torch.Tensor:
        cached = self._cached[1]
        if chunk not in cached:
            shape = tuple(end - begin for begin, end in chunk.bounds)
            path = self.folder / chunk.file
            try:
                with path.open("rb", buffering=0) as file:
                    tensor = torch.load(
                        _FilePart(file, chunk.offset, chunk.length),
                        map_location="cpu",
                        weights_only=True,
                    )
            except Exception as error:
                text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise CheckpointError(
                    path, f"the checkpoint cannot be loaded: {key} ({text})", remedy=_RESTORE
                ) from error
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.shape != shape
                or tensor.dtype != self.tensors[key].dtype
            ):
                raise CheckpointError(path, f"has another tensor than {key}", remedy=_RESTORE)
            cached[chunk] = tensor
        return cached[chunk]


def _optimizer_state(metadata: Any) -> tuple[int, int]:
    found = [
        entry.size.numel() * entry.properties.dtype.itemsize
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and _is_of_optimizer(key)
    ]
    return len(found), sum(found)


def _is_of_optimizer(key: str) -> bool:
    # Of a model with experts it is `chained_0.optimizer...` (ChainedOptimizer in optimizer.py).
    return "optimizer." in key


def _tensors(metadata: Any) -> Iterator[tuple[str, StoredTensor]]:
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or _is_of_optimizer(key):
            continue
        chunks = []
        shape = tuple(map(int, entry.size))
        for chunk in entry.chunks:
            info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            if info.relative_path != Path(info.relative_path).name or info.relative_path in (
                "",
                "..",
                ".",
            ):
                raise ValueError(
                    f"a chunk lies in {info.relative_path!r}, which is not a plain file name"
                )
            bounds = tuple(
                (int(o), int(o + s)) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            if len(bounds) != len(shape) or any(
                not 0 <= b <= e <= n for (b, e), n in zip(bounds, shape, strict=True)
            ):
                raise ValueError(f"a chunk of {key} is outside it")
            chunks.append(_Chunk(bounds, info.relative_path, int(info.offset), int(info.length)))
        yield key, StoredTensor(entry.properties.dtype, shape, tuple(chunks))
