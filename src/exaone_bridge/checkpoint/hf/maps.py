"""Tensors of safetensors files, held by nobody: views of memory-mapped files, or bytes read to where they belong.

What lies in one piece on both sides is read: the kernel copies it as it is, and maps no page for it, of which a view
has one for every 4 KiB (0.68 s of CPU for 2.6 GB, against 0.85 s). A view is for what is strided or changes its type.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType

import torch

from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.checkpoint.megatron.tensors import DTYPES
from exaone_bridge.errors import CheckpointError

__all__ = ["TensorMaps"]


class TensorMaps:
    """Files, opened when a tensor of theirs is first asked for by any thread; a context manager that lets them go."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> TensorMaps:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._maps.clear()  # each is unmapped when the last view of it goes
        while self._files:
            os.close(self._files.popitem()[1])

    def view(self, info: TensorInfo) -> torch.Tensor:
        """The tensor, without a copy: it must not outlive this object, nor be written to.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        dtype = DTYPES[info.dtype]
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        with self._lock:
            mapped = self._maps.get(info.file) or self._map(info)
        if info.offset + info.nbytes > len(mapped):
            raise _cut(info)
        flat = torch.frombuffer(
            mapped, dtype=dtype, count=math.prod(info.shape), offset=info.offset
        )
        return flat.view(info.shape)

    def _map(self, info: TensorInfo) -> mmap.mmap:
        if (file := self._files.get(info.file)) is None:
            file = self._files[info.file] = os.open(info.file, os.O_RDONLY)
        if not os.fstat(file).st_size:  # which cannot be mapped
            raise _cut(info)
        # A private map, because torch warns of one that cannot be written to.
        mapped = self._maps[info.file] = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
        return mapped

    def read(self, info: TensorInfo, begin: int, target: torch.Tensor) -> None:
        """Fill a contiguous tensor on the CPU with bytes, from `begin` on, of a tensor that `view` was asked for.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        left = memoryview(target.detach().view(-1).view(torch.uint8).numpy())
        at = info.offset + begin
        while left:
            if not (count := os.preadv(self._files[info.file], [left], at)):
                raise _cut(info)
            left, at = left[count:], at + count

    def release(self, info: TensorInfo) -> None:
        """Give the tensor's pages back, so that a load's memory does not grow by the files it has read."""
        mapped = self._maps.get(info.file)
        if mapped is not None:
            begin = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            if info.offset + info.nbytes > begin:
                mapped.madvise(mmap.MADV_DONTNEED, begin, info.offset + info.nbytes - begin)


def _cut(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        info.file, f"ends within {info.name}", remedy="download or copy it again"
    )
