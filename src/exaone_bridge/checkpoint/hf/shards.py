"""Writes safetensors files: the one writer of weights. No torch.

The header of a file follows from the names, dtypes and shapes of its tensors. So a file gets its
full size and its header before the first tensor is there, and each tensor has its place in it: the
tensors can be written in any order, by any process. A tensor that an earlier run has left is
compared with the new one byte by byte, and written where it differs: resuming needs no record,
which could be wrong. A file has the order of safetensors' own writer: last dtype first, then by
name. The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from exaone_bridge.checkpoint.hf.headers import INDEX, SINGLE_FILE, TensorInfo, TensorSpec
from exaone_bridge.checkpoint.staging import flush_file
from exaone_bridge.schema.dtypes import DTYPE_BYTES
from exaone_bridge.schema.json_types import JSONObject

__all__ = [
    "MAX_SHARD_BYTES",
    "ShardLayout",
    "ShardWriter",
    "assign_files",
    "shard_layout",
    "write_index",
]

MAX_SHARD_BYTES = 5 * 10**9  # as Transformers' save_pretrained
_COMPARED_BYTES = 1 << 22  # at once
_DTYPE_ORDER = {dtype: index for index, dtype in enumerate(DTYPE_BYTES)}
_MAX_BUFFERS = 512  # of one write; Linux takes 1024


def assign_files(
    sizes: Mapping[str, int], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Assign tensors to files in the order given; a tensor that does not fit begins a new file.

    Args:
        sizes: Bytes of each tensor.
        max_shard_bytes: Of one file; a larger tensor has a file of its own.

    Returns:
        Tensor -> file name.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, SINGLE_FILE)
    return {
        name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, names in enumerate(shards, start=1)
        for name in names
    }


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """A set of safetensors files before their tensors are written.

    Attributes:
        places: Tensor -> file name, first byte in the file, bytes.
        headers: File name -> header, with its length in front.
        sizes: File name -> bytes.
    """

    places: Mapping[str, tuple[str, int, int]]
    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(nbytes for _, _, nbytes in self.places.values())


def shard_layout(
    specs: Iterable[TensorSpec | TensorInfo], files: Mapping[str, str] | str
) -> ShardLayout:
    """Lay out the files of these tensors.

    Args:
        specs: The tensors.
        files: Tensor -> file name; or the name of one file for all, which may be none.
    """
    by_file: dict[str, list[TensorSpec | TensorInfo]] = defaultdict(list)
    if isinstance(files, str):
        by_file[files] = list(specs)
    else:
        for spec in specs:
            by_file[files[spec.name]].append(spec)
    places, headers, sizes = {}, {}, {}
    for file, tensors in sorted(by_file.items()):
        tensors.sort(key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name))
        entries: JSONObject = {"__metadata__": {"format": "pt"}}  # Transformers asks for it
        position = 0
        for spec in tensors:
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
        sizes[file] = len(headers[file]) + position
        position = len(headers[file])
        for spec in tensors:
            places[spec.name] = (file, position, spec.nbytes)
            position += spec.nbytes
    return ShardLayout(places, headers, sizes)


class ShardWriter:
    """Writes tensors into the files of a folder, on any thread.

    One process calls `create`; then any number of processes have a writer with `resumed` of the
    first. As a context manager it flushes at the end of the body, unless that raises.

    Attributes:
        resumed: Files that an earlier run has begun.
        written_bytes: Bytes of the tensors that were written.
        kept_bytes: Bytes of the tensors that an earlier run has written.
    """

    def __init__(
        self, folder: Path, layout: ShardLayout, resumed: frozenset[str] = frozenset()
    ) -> None:
        self.folder, self.layout, self.resumed = folder, layout, resumed
        self.written_bytes = self.kept_bytes = 0
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls, folder: Path, layout: ShardLayout, *, remove_others: bool = True
    ) -> ShardWriter:
        """Create every file at its full size with its header, or keep the one that is there.

        Args:
            folder: An existing folder.
            layout: The files.
            remove_others: Remove all other safetensors files of the folder.
        """
        for path in folder.glob("*.safetensors") if remove_others else ():
            if path.name not in layout.headers:
                path.unlink()
        resumed = set()
        for file, header in layout.headers.items():
            path = folder / file
            if _has_header(path, header, layout.sizes[file]):
                resumed.add(file)
                continue
            path.unlink(missing_ok=True)
            with path.open("xb") as stream:
                stream.write(header)
                stream.truncate(layout.sizes[file])
        return cls(folder, layout, frozenset(resumed))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(flush=error is None)

    def put(self, name: str, pieces: Sequence[memoryview]) -> None:
        """Write a tensor.

        Args:
            name: Of the tensor.
            pieces: Its bytes, one piece after the other.
        """
        file, position, nbytes = self.layout.places[name]
        if (given := sum(len(piece) for piece in pieces)) != nbytes:
            raise ValueError(f"{name} has {nbytes} bytes, and {given} were given.")
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.folder / file, os.O_RDWR)
            descriptor = self._descriptors[file]
        kept = file in self.resumed and _is_written(descriptor, position, pieces)
        if not kept:
            _write(descriptor, position, pieces)
        with self._lock:
            if kept:
                self.kept_bytes += nbytes
            else:
                self.written_bytes += nbytes

    def close(self, *, flush: bool = True) -> None:
        """Close the files; `flush`: wait until what was written is on the disk."""
        while self._descriptors:
            _, descriptor = self._descriptors.popitem()
            try:
                if flush:
                    flush_file(descriptor)
            finally:
                os.close(descriptor)


def _has_header(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.is_symlink() or path.stat().st_size != size:
        return False
    with path.open("rb") as stream:
        return stream.read(len(header)) == header


def _write(descriptor: int, position: int, pieces: Sequence[memoryview]) -> None:
    queue = [piece for piece in pieces if len(piece)]
    first = 0
    while first < len(queue):
        done = os.pwritev(descriptor, queue[first : first + _MAX_BUFFERS], position)
        position += done
        while first < len(queue) and done >= len(queue[first]):
            done -= len(queue[first])
            first += 1
        if done:
            queue[first] = queue[first][done:]


def _is_written(descriptor: int, position: int, pieces: Sequence[memoryview]) -> bool:
    for piece in pieces:
        for begin in range(0, len(piece), _COMPARED_BYTES):
            expected = piece[begin : begin + _COMPARED_BYTES]
            found = bytearray(len(expected))  # bytearrays are compared with memcmp
            if os.preadv(descriptor, [found], position) != len(expected) or found != expected:
                return False
            position += len(expected)
    return True


def write_index(folder: Path, layout: ShardLayout) -> None:
    """Write the index of the files, unless there is a single one of the usual name."""
    if set(layout.headers) == {SINGLE_FILE}:
        return
    index = {
        "metadata": {"total_size": layout.nbytes},
        "weight_map": {name: layout.places[name][0] for name in sorted(layout.places)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
