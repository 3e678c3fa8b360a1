"""Tensors of safetensors files as views of memory-mapped files: read where they are used, and held by nobody."""

from __future__ import annotations

import math
import mmap
import threading
from pathlib import Path
from types import TracebackType

import torch

from exaone_bridge.checkpoint.headers import TensorInfo
from exaone_bridge.checkpoint.tensors import DTYPES
from exaone_bridge.errors import CheckpointError

__all__ = ["TensorMaps"]


class TensorMaps:
    """Files, mapped when a tensor of theirs is first asked for by any thread; a context manager that lets them go."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorMaps:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._maps.clear()  # each is unmapped when the last view of it goes

    def view(self, info: TensorInfo) -> torch.Tensor:
        """The tensor, without a copy: it must not outlive this object, nor be written to.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        dtype = DTYPES[info.dtype]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        with self._lock:
            mapped = self._maps.get(info.file) or self._map(info.file)
        if info.offset + info.nbytes > len(mapped):
            raise CheckpointError(info.file, f"ends within {info.name}", remedy="download or copy it again")
        flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(info.shape), offset=info.offset)
        return flat.view(info.shape)

    def _map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:  # a private map, because torch warns of one that cannot be written to
            self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]

    def release(self, info: TensorInfo) -> None:
        """Give the tensor's pages back, so that a load's memory does not grow by the files it has read."""
        mapped = self._maps.get(info.file)
        if mapped is not None:
            begin = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            if info.offset + info.nbytes > begin:
                mapped.madvise(mmap.MADV_DONTNEED, begin, info.offset + info.nbytes - begin)
