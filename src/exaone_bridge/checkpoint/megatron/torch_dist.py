"""Megatron-Core's distributed checkpoints (`torch_dist`) without Megatron-Core: their tensors, and the bytes of each.

The format is torch.distributed.checkpoint's: `.metadata` says which file holds which chunk of which tensor, and each
chunk is what `torch.save` wrote. `megatron/core/dist_checkpointing/strategies/torch.py` (0.19.2) names the tensors: a
layer's by its number, or all layers' together along a first axis; an expert's along a further one.
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
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from exaone_bridge.checkpoint.reshard.plan import Slice
from exaone_bridge.checkpoint.reshard.validate import validate_cover
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.param_mapping import ParamMapping

__all__ = ["StoredTensor", "TorchDist", "key_of"]

_RESTORE = "restore the missing or cut files"
# What a `.metadata` is made of; anything else could run code while it is read.
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
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "list", "dict", "tuple", "slice"},
}


def key_of(
    mapping: ParamMapping, numbers: tuple[int, ...], *, stacked: bool
) -> tuple[str, tuple[int, ...]]:
    """What a checkpoint calls a parameter, and where along the leading axes it lies.

    Args:
        numbers: the layer, and the expert where the row has experts.
        stacked: whether all layers lie in one tensor.
    """
    name, where = mapping.megatron, numbers
    if mapping.experts:  # one tensor for all experts of a layer, whichever class holds them
        name = name.removesuffix("*").replace(".mlp.experts.", ".mlp.experts.experts.")
    if not numbers:  # multi-token prediction keeps an older name there (`MultiTokenPredictionLayer.sharded_state_dict`)
        return name.replace(".mtp_model_layer.", ".transformer_layer."), ()
    if stacked:
        return name.replace(".*", "", 1), where
    return name.replace("*", str(numbers[0]), 1), where[1:]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")


@dataclass(frozen=True, slots=True)
class _Chunk:
    box: Slice
    file: str
    offset: int  # bytes from the start of the file
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint: its type, its shape, and its chunks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


class _Slice(io.RawIOBase):
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
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        read = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += read
        return int(read)


class TorchDist:
    """A checkpoint's tensors, read a chunk at a time; what else is in it (optimizer, extra states) is left alone.

    The chunks of the parameter read last stay in memory, because queries, keys and values lie in one.

    Raises:
        CheckpointError: no checkpoint there, or one whose metadata cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            self.tensors: Mapping[str, StoredTensor] = dict(_tensors(metadata))
        except FileNotFoundError as error:
            raise CheckpointError(
                path,
                "the checkpoint's metadata is missing",
                remedy="name a folder that `import` wrote",
            ) from error
        except (
            Exception
        ) as error:  # of pickle, or of objects that are not what their class says: a damaged file
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(
                path, f"cannot be read ({text})", remedy="restore the checkpoint"
            ) from error
        self._held: tuple[object, dict[_Chunk, torch.Tensor]] = (None, {})
        # of those whose chunks are known to cover them, each element once: the chunks of each parameter
        self._by_lead: dict[str, dict[tuple[int, ...], list[_Chunk]]] = {}

    def read_into(self, target: torch.Tensor, key: str, lead: tuple[int, ...], box: Slice) -> None:
        """Copy a rectangle of a parameter, converted to the target's type.

        Args:
            lead: where the parameter lies along the leading axes of `key`, which may hold those of all layers.
            box: in all axes of `key`.

        Raises:
            CheckpointError: a chunk that is missing or damaged, or a rectangle that the chunks do not cover.
        """
        stored = self.tensors[key]
        if self._held[0] != (key, lead):
            self._held = ((key, lead), {})  # first let go of the last one
        if key not in self._by_lead:
            validate_cover(stored.shape, [chunk.box for chunk in stored.chunks], self._fault(key))
            self._by_lead[key] = {}
        for chunk in self._near(key, lead):
            meet = [
                (max(b, cb), min(e, ce)) for (b, e), (cb, ce) in zip(box, chunk.box, strict=True)
            ]
            if any(b >= e for b, e in meet):
                continue
            source = self._chunk(key, chunk)
            there = source[
                tuple(
                    slice(b - cb, e - cb) for (b, e), (cb, _) in zip(meet, chunk.box, strict=True)
                )
            ]
            here = target[
                tuple(slice(b - tb, e - tb) for (b, e), (tb, _) in zip(meet, box, strict=True))
            ]
            here.copy_(there)

    def _near(self, key: str, lead: tuple[int, ...]) -> list[_Chunk]:
        """The chunks that a parameter lies in: of hundreds, where a tensor holds all experts."""
        found = self._by_lead[key]
        if not found:
            for chunk in self.tensors[key].chunks:
                for place in itertools.product(
                    *(range(begin, end) for begin, end in chunk.box[: len(lead)])
                ):
                    found.setdefault(place, []).append(chunk)
        return found[lead]

    def _fault(self, key: str) -> Callable[[Slice, str], CheckpointError]:
        return lambda box, fault: CheckpointError(
            self.folder, f"in {key} {box} {fault}", remedy=_RESTORE
        )

    def _chunk(self, key: str, chunk: _Chunk) -> torch.Tensor:
        held = self._held[1]
        if chunk not in held:
            shape = tuple(end - begin for begin, end in chunk.box)
            path = self.folder / chunk.file
            try:
                with path.open("rb", buffering=0) as file:
                    tensor = torch.load(
                        _Slice(file, chunk.offset, chunk.length),
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
                raise CheckpointError(
                    path, f"holds something else than {key} should be", remedy=_RESTORE
                )
            held[chunk] = tensor
        return held[chunk]


def _tensors(metadata: Any) -> Iterator[tuple[str, StoredTensor]]:
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or key.startswith("optimizer."):
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
                    f"a chunk lies in {info.relative_path!r}, which is no plain file name"
                )
            box = tuple(
                (int(o), int(o + s)) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            if len(box) != len(shape) or any(
                not 0 <= b <= e <= n for (b, e), n in zip(box, shape, strict=True)
            ):
                raise ValueError(f"a chunk of {key} leaves it")
            chunks.append(_Chunk(box, info.relative_path, int(info.offset), int(info.length)))
        yield key, StoredTensor(entry.properties.dtype, shape, tuple(chunks))
