"""The safetensors headers of a Hugging Face checkpoint, read with the standard library alone.

Where each tensor lies, and whether the files can be trusted, is known before torch is imported or a weight is read.
What safetensors would refuse is refused here, in one sentence.
The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.dtypes import DTYPE_BYTES

__all__ = [
    "INDEX",
    "SINGLE_FILE",
    "FileStamp",
    "TensorInfo",
    "TensorSpec",
    "read_file_header",
    "read_headers",
    "read_json",
]

SINGLE_FILE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_FIELDS: Final = {"dtype", "shape", "data_offsets"}
_MAX_JSON_BYTES: Final = (
    100_000_000  # MAX_HEADER_SIZE of safetensors; no index or config comes near
)
_MAX_INT: Final = 2**63 - 1  # a header's numbers are 64-bit, and so are their products
# A header as safetensors writes it: up to the first name, and of an entry the name and the text of type and shape.
_HEAD: Final = re.compile(r'\{(?:"__metadata__":(\{[^{}\\]*\}),)?(?=")')
_ENTRY: Final = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+","shape":\[[0-9,]*\]),"data_offsets":'
)

# Names and values come from files that are not trusted: on one line, and never long.
_quote = reprlib.Repr(maxstring=200, maxdict=4, maxother=60).repr


class TensorSpec(NamedTuple):
    """The name, dtype (in safetensors' names: "BF16") and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class FileStamp(NamedTuple):
    """The size and modification time of a file: if either differs, the file has changed."""

    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        """Look at an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


class TensorInfo(NamedTuple):
    """Where a tensor lies on disk: `nbytes` bytes of `file`, row-major and little-endian.

    Attributes:
        dtype: In safetensors' names: "BF16".
        offset: First byte, counted from the beginning of the file.
        stamp: Of the file when its header was read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    stamp: FileStamp


_TENSOR: Final = functools.partial(
    tuple.__new__, TensorInfo
)  # as its own __new__, without a call in Python


def read_file_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one safetensors file, in offset order, and its `__metadata__` (empty if it has none).

    Reads the header only. Whatever this accepts safetensors accepts too: the tensors cover the data buffer exactly.

    Raises:
        CheckpointError: the file is missing, unreadable or damaged, or has a dtype outside `DTYPE_BYTES`.
    """
    with _open(path) as (stream, stamp):
        file_bytes = stamp.nbytes
        if file_bytes < 8:
            raise _damaged(path, f"is {file_bytes} bytes long, too short for a safetensors file")
        header_bytes = int.from_bytes(stream.read(8), "little")
        data_at = 8 + header_bytes
        if header_bytes > _MAX_JSON_BYTES:
            raise _damaged(
                path, f"its header claims {header_bytes} bytes, and may have {_MAX_JSON_BYTES}"
            )
        if data_at > file_bytes:
            raise _damaged(
                path, f"its header claims {header_bytes} bytes, and the whole file has {file_bytes}"
            )
        data = stream.read(header_bytes)
    return _as_safetensors_writes(path, data, data_at, stamp) or _in_any_order(
        path, data, data_at, stamp
    )


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name: files in name order, tensors in offset order within a file.

    Of `model.safetensors` and `model.safetensors.index.json` the single file wins, as it does in Transformers. Links
    may not lead out of the folder, except to the blobs of the Hugging Face hub cache that the folder is part of.

    Raises:
        CheckpointError: the folder holds no safetensors weights, a file is damaged, missing or elsewhere, or the index
            and the files disagree about which tensors there are and which file holds each.
    """
    if not folder.is_dir():
        raise CheckpointError(
            folder, "is not a folder", remedy="give the folder of config.json and the weights"
        )
    # The order of transformers.modeling_utils._get_resolved_checkpoint_files (5.12).
    single, index = folder / SINGLE_FILE, folder / INDEX
    if single.is_file():
        return read_file_header(_at_home(single))[0]
    if index.is_file():
        return _read_shards(_at_home(index))
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        problem = f"its weights are pickles ({_quote(pickles[0])}), refused because loading them runs code"
        remedy = "convert them to safetensors with Transformers' save_pretrained"
        raise CheckpointError(folder, problem, remedy=remedy)
    raise CheckpointError(
        folder, f"holds neither {SINGLE_FILE} nor {INDEX}", remedy="download the weights into it"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, such as config.json or an index.

    Raises:
        CheckpointError: the file is missing, unreadable, over 100 MB, not UTF-8, not JSON, nested too deep or not an
            object, or an object in it has a key twice.
    """
    with _open(path) as (stream, stamp):
        file_bytes = stamp.nbytes
        if file_bytes > _MAX_JSON_BYTES:
            raise _damaged(
                path, f"is {file_bytes} bytes long, and a JSON file may have {_MAX_JSON_BYTES}"
            )
        return _parse(path, stream.read(file_bytes), "it")


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    """The tensors of all the files that `index` lists, after checking that it and they agree."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "has no weight_map from tensors to files")
    if not set(map(type, weight_map.values())) <= {str}:
        name, shard = next(pair for pair in weight_map.items() if not isinstance(pair[1], str))
        raise _damaged(
            index, f"maps tensor {_quote(name)} to {_quote(shard)}, which is no file name"
        )

    whole = "download or copy the whole checkpoint again"
    tensors: dict[str, TensorInfo] = {}
    found: dict[str, object] = {}  # the weight_map that the files themselves make
    for shard in sorted(set(weight_map.values())):
        if (
            not shard.endswith(".safetensors")
            or not shard.isprintable()
            or any(s in shard for s in ("/", "\\", ".."))
        ):
            problem = f"lists the file {_quote(shard)}, which is not the plain name of a .safetensors file beside it"
            raise CheckpointError(index, problem, remedy="use a checkpoint that you trust")
        path = index.with_name(shard)
        if not os.path.isfile(
            path
        ):  # unlike Path.is_file, also False for a name that no file system takes
            problem = f"lists the file {_quote(shard)}, which is missing"
            raise CheckpointError(index, problem, remedy="download or copy that file again")
        held, _ = read_file_header(_at_home(path))
        if twice := sorted(held.keys() & tensors.keys()):
            problem = f"holds tensor {_quote(twice[0])}, and so does {found[twice[0]]}"
            raise CheckpointError(path, problem, remedy=whole)
        tensors |= held
        found |= dict.fromkeys(held, shard)

    if found != weight_map:
        name = min(
            name
            for name in found.keys() | weight_map.keys()
            if found.get(name) != weight_map.get(name)
        )
        says = (
            f"is in {_quote(weight_map[name])} by this index"
            if name in weight_map
            else "is not in this index"
        )
        passed = (
            f"is in {_quote(found[name])} in fact" if name in found else "is in none of its files"
        )
        raise CheckpointError(index, f"tensor {_quote(name)} {says}, and {passed}", remedy=whole)
    return tensors


def _as_safetensors_writes(
    path: Path, data: bytes, data_at: int, stamp: FileStamp
) -> tuple[dict[str, TensorInfo], dict[str, str]] | None:
    """What `_in_any_order` makes of a header, if it is to the letter as safetensors writes it and has nothing wrong.

    A checkpoint may have 60,000 tensors, and few shapes. What was found is written out again and compared with the
    text, so that nothing can have been misread; whatever differs is for the other function, which finds the words.
    """
    try:
        text = data.decode().rstrip(" ")
        head = _HEAD.match(text)
        metadata = json.loads(head[1], object_pairs_hook=_unique) if head and head[1] else {}
        names, kinds = zip(*_ENTRY.findall(text, head.end()), strict=True) if head else ((), ())
        known = {kind: _kind(*kind.split('","shape":', 1)) for kind in set(kinds)}
    except (KeyError, ValueError, RecursionError):
        return None
    if not head or not set(map(type, metadata.values())) <= {str} or None in known.values():
        return None
    dtypes, shapes, sizes = zip(*map(known.__getitem__, kinds), strict=True)
    ends = list(itertools.accumulate(sizes, initial=0))
    entries = [
        f'"{name}":{{"dtype":"{kind},"data_offsets":[{begin},{end}]}}'
        for name, kind, begin, end in zip(names, kinds, ends[:-1], ends[1:], strict=True)
    ]
    if text[head.end() :] != ",".join(entries) + "}" or data_at + ends[-1] != stamp.nbytes:
        return None
    offsets = map(data_at.__add__, ends)
    paths, stamps = itertools.repeat(path), itertools.repeat(stamp)
    tensors = map(_TENSOR, zip(names, dtypes, shapes, paths, offsets, sizes, stamps, strict=False))
    found = dict(zip(names, tensors, strict=True))
    return None if len(found) < len(names) or "__metadata__" in found else (found, metadata)


def _kind(dtype: str, shape: str) -> tuple[str, tuple[int, ...], int] | None:
    """A type, a shape and its bytes; None: there is something wrong with it."""
    lengths = json.loads(shape)
    nbytes = _nbytes(dtype, lengths)
    return (
        None
        if nbytes is None or max(lengths, default=0) > _MAX_INT
        else (dtype, tuple(lengths), nbytes)
    )


def _in_any_order(
    path: Path, data: bytes, data_at: int, stamp: FileStamp
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a header, however it is written, and its metadata."""
    header = _parse(path, data, "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise _damaged(path, f"its __metadata__ is {_quote(metadata)}, and must map text to text")
    tensors = [_tensor(path, name, entry, data_at, stamp) for name, entry in header.items()]
    tensors.sort(key=operator.attrgetter("offset", "nbytes"))
    at = data_at
    for tensor in tensors:
        if tensor.offset != at:
            fault = (
                "overlaps the tensor before it"
                if tensor.offset < at
                else "follows bytes that no tensor owns"
            )
            raise _damaged(path, f"tensor {_quote(tensor.name)} {fault}")
        at += tensor.nbytes
    if at != stamp.nbytes:
        raise _damaged(path, f"its last {stamp.nbytes - at} bytes belong to no tensor")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _tensor(path: Path, name: str, entry: object, data_at: int, stamp: FileStamp) -> TensorInfo:
    """One entry of a header; its data_offsets count from `data_at`, in bytes."""
    if not (isinstance(entry, dict) and entry.keys() == _FIELDS and _well_typed(**entry)):
        wanted = "a dtype, a shape and two data_offsets in whole numbers from 0 up"
        raise _damaged(
            path, f"tensor {_quote(name)} is described by {_quote(entry)}, and must have {wanted}"
        )
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        problem = f"tensor {_quote(name)} has dtype {_quote(dtype)}, and must have one of {', '.join(DTYPE_BYTES)}"
        raise CheckpointError(path, problem, remedy="save it in one of these dtypes")
    buffer_bytes = stamp.nbytes - data_at
    if not begin <= end <= buffer_bytes:
        raise _damaged(
            path,
            f"tensor {_quote(name)} lies at bytes {begin} to {end} of a buffer of {buffer_bytes}",
        )
    nbytes = _nbytes(dtype, shape)
    if nbytes is None:
        raise _damaged(
            path,
            f"tensor {_quote(name)} has shape {_quote(shape)}, which is larger than 64 bits count",
        )
    if nbytes != end - begin:
        problem = f"has {end - begin} bytes, and {dtype} of shape {_quote(shape)} takes {nbytes}"
        raise _damaged(path, f"tensor {_quote(name)} {problem}")
    return TensorInfo(name, dtype, tuple(shape), path, data_at + begin, nbytes, stamp)


def _nbytes(dtype: str, shape: list[int]) -> int | None:
    """Bytes of a tensor; None: more than 64 bits count, on the way too."""
    nbytes = DTYPE_BYTES[dtype]
    for length in shape:
        nbytes *= length
        if (
            nbytes > _MAX_INT
        ):  # stops here: the product of a million large lengths would take minutes
            return None
    return nbytes


def _well_typed(dtype: Any, shape: Any, data_offsets: Any) -> bool:
    """Whether the fields of an entry are text, a list and a pair of 63-bit integers; True and 1.0 are no integers."""
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(data_offsets, list)):
        return False
    for number in shape + data_offsets:  # a plain loop, the fastest way: it runs for every tensor
        if type(number) is not int or not 0 <= number <= _MAX_INT:
            return False
    return len(data_offsets) == 2


def _at_home(path: Path) -> Path:
    """`path`, unless it is a link to a file that is not the checkpoint's own."""
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    # The hub cache: snapshots/<revision>/<file> links to ../../blobs/<hash> (huggingface_hub.file_download).
    in_hub_cache = (
        folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    )
    if not target.is_relative_to(folder) and not in_hub_cache:
        problem = f"is a link to {_quote(str(target))}, which is outside the checkpoint's folder"
        raise CheckpointError(path, problem, remedy="put the file itself there")
    return path


@contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, FileStamp]]:
    """Open a file for reading, and look at its size."""
    if not os.path.isfile(
        path
    ):  # before open, which would wait for a writer where `path` is a named pipe
        raise _damaged(path, "is missing or is not a file")
    try:
        with open(path, "rb") as stream:
            yield stream, FileStamp.of(stream.fileno())
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise CheckpointError(path, problem, remedy="check its permissions and its disk") from error


def _parse(path: Path, data: bytes, what: str) -> dict[str, Any]:
    """`data`, which a message calls `what`, as a JSON object."""
    try:
        text = data.decode()
        # "-0" is a float to safetensors, and can be no length or offset; the hook is slow, and seldom needed.
        parse_int = _integer if "-0" in text else None
        value = json.loads(text, object_pairs_hook=_unique, parse_int=parse_int)
        if (
            "\\u" in text
        ):  # may spell half a surrogate pair, which is no text: encode raises a ValueError
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _damaged(path, f"{what} is not UTF-8 text from byte {error.start} on") from error
    except ValueError as error:
        raise _damaged(path, f"{what} is not valid JSON ({error})") from error
    except RecursionError as error:
        raise _damaged(path, f"{what} is JSON nested too deep to read") from error
    if not isinstance(value, dict):
        raise _damaged(path, f"{what} is {_quote(value)}, and must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a key that comes again must not silently replace the first."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {_quote(key)} is there twice")
    return value


def _integer(text: str) -> float:
    """A JSON integer, except that -0 is a float."""
    return -0.0 if text == "-0" else int(text)


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(path, problem, remedy="download or copy it again")
