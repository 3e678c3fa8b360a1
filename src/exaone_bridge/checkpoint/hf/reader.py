"""Reads tensors of safetensors files: the one reader of weights, over one pool of open files.

A contiguous slice that keeps its dtype is read with `preadv` straight to where it belongs: the
kernel copies it, and no page is mapped (0.68 s of CPU for 2.6 GB, against 0.85 s through a memory
map). A view of a memory map is for slices that are strided or change their dtype.

torch is imported when the first tensor is read, not with this module.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.dtypes import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

__all__ = ["TensorReader"]


class TensorReader:
    """Reads tensors, and keeps each file open (and mapped, where it was viewed) once it was used.

    Any thread may use it, and so may forked processes: reads carry their own position. A pickled
    copy opens the files for itself. Every method raises CheckpointError if a file has changed or
    shrunk since its header was read.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TensorReader], tuple[()]]:
        return TensorReader, ()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the reader opens them again if it is used again."""
        self._maps.clear()  # each is unmapped when the last view of it is gone
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, info: TensorInfo) -> torch.Tensor:
        """Read a tensor into memory of its own.

        Returns:
            `[*info.shape]`, contiguous and on the CPU.

        Raises:
            CheckpointError: The file cannot be read, or has changed since its header was read.
        """
        import torch

        from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES

        tensor = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        self.read_into(info, tensor)
        return tensor

    def read_into(
        self, info: TensorInfo, target: torch.Tensor | memoryview, begin: int = 0
    ) -> None:
        """Fill a tensor with bytes of a tensor, which has the dtype `info.dtype`.

        Args:
            target: [...], a contiguous CPU tensor of any shape and dtype, or its bytes.
            begin: The first byte to be read, counted from the beginning of the tensor; the first
                of an element, if the tensor is cast.

        Raises:
            CheckpointError: The file cannot be read, or has changed since its header was read.
            ValueError: The tensor on disk has fewer bytes than that.
        """
        from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES, byte_view

        left = target if isinstance(target, memoryview) else byte_view(target)
        if begin + len(left) > info.nbytes:
            raise ValueError(
                f"{info.name} has {info.nbytes} bytes, not {begin + len(left)} as wanted."
            )
        if not left:
            return
        if info.cast_from is not None:
            import torch

            size = DTYPE_BYTES[info.dtype]
            stored = torch.empty(len(left) // size, dtype=TORCH_DTYPES[info.cast_from])
            self.read_into(info.on_disk, stored, begin // size * stored.itemsize)
            left[:] = byte_view(stored.to(TORCH_DTYPES[info.dtype]))
            return
        descriptor = self._open(info)
        position = info.offset + begin
        while left:
            if not (count := os.preadv(descriptor, [left], position)):
                raise _changed(info)
            left, position = left[count:], position + count
        _check_unchanged(info, descriptor)

    def view(self, info: TensorInfo) -> torch.Tensor:
        """Map a tensor without reading it, unless it is cast; call `release` when it was used.

        Returns:
            `[*info.shape]`; it must not outlive this reader, nor be written to.

        Raises:
            CheckpointError: The file cannot be read, or has changed since its header was read.
        """
        import torch

        from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES

        dtype = TORCH_DTYPES[info.dtype]
        if info.cast_from is not None:
            return self.view(info.on_disk).to(dtype)
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        descriptor = self._open(info)
        _check_unchanged(info, descriptor)  # to touch a page that is gone would end the process
        with self._lock:
            if (mapped := self._maps.get(info.file)) is None:
                # A private map, because torch warns of one that cannot be written to.
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
                self._maps[info.file] = mapped
        flat = torch.frombuffer(
            mapped, dtype=dtype, count=math.prod(info.shape), offset=info.offset
        )
        return flat.view(info.shape)

    def release(self, info: TensorInfo) -> None:
        """Give the pages of a viewed tensor back, so that memory does not grow by what was read.

        Raises:
            CheckpointError: The file has changed since its header was read.
        """
        info = info.on_disk
        if (mapped := self._maps.get(info.file)) is None:
            return
        _check_unchanged(info, self._descriptors[info.file])
        begin = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if info.offset + info.nbytes > begin:
            mapped.madvise(mmap.MADV_DONTNEED, begin, info.offset + info.nbytes - begin)

    def _open(self, info: TensorInfo) -> int:
        with self._lock:
            if (descriptor := self._descriptors.get(info.file)) is None:
                try:
                    descriptor = os.open(info.file, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(
                        info.file,
                        f"cannot be opened ({error.strerror}), and its header was read before",
                        remedy="download or copy it again",
                    ) from error
                self._descriptors[info.file] = descriptor
        return descriptor


def _check_unchanged(info: TensorInfo, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != info.stamp:  # FileStamp.of takes twice as long
        raise _changed(info)


def _changed(info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        info.file,
        f"has changed since its header was read, while {info.name} was read",
        remedy="start again once nothing writes to it, or download or copy it again",
    )
