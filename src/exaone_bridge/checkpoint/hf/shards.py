"""safetensors files whose tensors are written in any order, by any process, and again where they differ. No torch.

A file's header follows from its tensors' names, types and shapes, so the file has its full size and its header before
the first tensor comes, and each tensor has its place. What an earlier run has left is compared with the tensor that
comes, byte by byte, and written where it differs: continuing needs no record that could be wrong.
The order of a file is that of safetensors' own writer: by size of the type, then by name.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.headers import INDEX, TensorInfo, TensorSpec
from exaone_bridge.schema.dtypes import DTYPE_BYTES

__all__ = ["ShardWriter", "Shards", "lay_out", "write_index"]

_STEP = 1 << 22  # bytes that are compared at once
_PIECES = 512  # buffers of one write; Linux takes 1024
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
Buffer = Any  # memoryview of bytes


@dataclass(frozen=True, slots=True)
class Shards:
    """Where each tensor of a set of files lies: (file, first byte, bytes); each file's header and size."""

    places: Mapping[str, tuple[str, int, int]]
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(nbytes for _, _, nbytes in self.places.values())


def lay_out(specs: Iterable[TensorSpec | TensorInfo], files: Mapping[str, str]) -> Shards:
    """The files of these tensors; `files`: tensor -> file name."""
    by_file: dict[str, list[TensorSpec | TensorInfo]] = defaultdict(list)
    for spec in specs:
        by_file[files[spec.name]].append(spec)
    places, headers, sizes = {}, {}, {}
    for file, held in sorted(by_file.items()):
        held.sort(key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in held:
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + at
        at = len(headers[file])
        for spec in held:
            places[spec.name] = (file, at, spec.nbytes)
            at += spec.nbytes
    return Shards(places, headers, sizes)


class ShardWriter:
    """Writes tensors into a folder's files. One process calls `create`; then any number of them write, on any thread.

    Attributes:
        written, kept: bytes of tensors that were written, and that were there already.
    """

    def __init__(self, folder: Path, shards: Shards, resumed: frozenset[str] = frozenset()) -> None:
        self.folder, self.shards, self.resumed = folder, shards, resumed
        self.written = self.kept = 0
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, folder: Path, shards: Shards) -> ShardWriter:
        """Make every file, with its header and at its full size, and keep those that an earlier run has left."""
        for path in folder.glob("*.safetensors"):
            if path.name not in shards.headers:
                path.unlink()
        resumed = set()
        for file, header in shards.headers.items():
            path = folder / file
            if (
                path.is_file()
                and not path.is_symlink()
                and path.stat().st_size == shards.sizes[file]
            ):
                with path.open("rb") as stream:
                    if stream.read(len(header)) == header:
                        resumed.add(file)
                        continue
            path.unlink(missing_ok=True)
            with path.open("xb") as stream:
                stream.write(header)
                stream.truncate(shards.sizes[file])
        return cls(folder, shards, frozenset(resumed))

    def put(self, name: str, pieces: Sequence[Buffer]) -> None:
        """Write one tensor, whose bytes are these pieces one after the other."""
        file, at, nbytes = self.shards.places[name]
        if (given := sum(len(piece) for piece in pieces)) != nbytes:
            raise ValueError(f"{name} has {nbytes} bytes, and {given} were given.")
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.folder / file, os.O_RDWR)
            handle = self._handles[file]
        same = file in self.resumed and _same(handle, at, pieces)
        if not same:
            _write(handle, at, pieces)
            _begin_flush(handle, at, nbytes)
        with self._lock:
            self.kept, self.written = self.kept + same * nbytes, self.written + (not same) * nbytes

    def close(self) -> None:
        """Flush what this process has written to the disk, and close its files."""
        while self._handles:
            _, handle = self._handles.popitem()
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def abandon(self) -> None:
        """Close the files, and leave to a later run what is in them."""
        while self._handles:
            os.close(self._handles.popitem()[1])


def _write(handle: int, at: int, pieces: Sequence[Buffer]) -> None:
    queue = [piece for piece in pieces if len(piece)]
    first = 0
    while first < len(queue):
        done = os.pwritev(handle, queue[first : first + _PIECES], at)
        at += done
        while first < len(queue) and done >= len(queue[first]):
            done -= len(queue[first])
            first += 1
        if done:
            queue[first] = queue[first][done:]


def _begin_flush(handle: int, at: int, nbytes: int) -> None:
    """Have the disk begin with these bytes while others are being written, where the system can be told to."""
    if _sync_file_range is not None:
        _sync_file_range(handle, ctypes.c_int64(at), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE)


def _same(handle: int, at: int, pieces: Sequence[Buffer]) -> bool:
    for piece in pieces:
        for begin in range(0, len(piece), _STEP):
            wanted = piece[begin : begin + _STEP]
            found = bytearray(len(wanted))
            if (
                os.preadv(handle, [found], at) != len(wanted) or found != wanted
            ):  # a bytearray compares by memcmp
                return False
            at += len(wanted)
    return True


def index_of(shards: Shards) -> dict[str, Any] | None:
    """The index of the files; None where there is a single one, of the usual name."""
    if set(shards.headers) == {"model.safetensors"}:
        return None
    return {
        "metadata": {"total_size": shards.nbytes},
        "weight_map": {name: shards.places[name][0] for name in sorted(shards.places)},
    }


def write_index(folder: Path, shards: Shards) -> None:
    """Write the index, where there is one to be written."""
    if (index := index_of(shards)) is not None:
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
