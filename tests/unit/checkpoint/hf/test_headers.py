"""The header reader against safetensors, and every kind of damage of a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf import headers
from exaone_bridge.checkpoint.hf.headers import (
    FileStamp,
    TensorInfo,
    read_file_header,
    read_headers,
    read_json,
)
from exaone_bridge.schema.dtypes import DTYPE_BYTES
from tests.helpers.safetensors_files import (
    INDEX,
    SINGLE,
    A,
    B,
    by_safetensors,
    by_us,
    entry,
    file_bytes,
    rejection_of,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file and a sharded folder by safetensors: every dtype, a scalar, an empty tensor."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    names = (
        "bool uint8 int8 int16 uint16 float16 bfloat16 int32 uint32 float32 float64 int64 uint64"
    )
    dtypes = [getattr(torch, name) for name in (*names.split(), "float8_e4m3fn", "float8_e5m2")]
    noise = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(dtypes):
        raw = torch.randint(
            0,
            2 if dtype is torch.bool else 256,
            (3, 8 * (i + 1)),
            generator=noise,
            dtype=torch.uint8,
        )
        tensors[f"layer.{i}"] = raw.view(dtype)
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "é\n😀": torch.ones(2, 3, 1),
    }
    folder = tmp_path_factory.mktemp("saved")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt", "who": "ü"})
    (folder / "sharded").mkdir()
    shards = {B: list(tensors)[::2], A: list(tensors)[1::2]}
    for shard, names_in_shard in shards.items():
        save_file(
            {name: tensors[name] for name in names_in_shard},
            folder / "sharded" / shard,
            metadata={"format": "pt"},
        )
    weight_map = {
        name: shard for shard, names_in_shard in shards.items() for name in names_in_shard
    }
    (folder / "sharded" / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def test_a_single_file_is_what_safetensors_reads(saved: Path) -> None:
    tensors, metadata = read_file_header(saved / SINGLE)
    assert by_us(tensors) == by_safetensors(saved / SINGLE)
    assert {info.dtype for info in tensors.values()} == DTYPE_BYTES.keys()
    assert metadata == {"format": "pt", "who": "ü"}
    assert list(tensors.values()) == sorted(
        tensors.values(), key=lambda info: (info.offset, info.nbytes)
    )
    assert read_headers(saved) == tensors


def test_a_sharded_folder_is_what_safetensors_reads(saved: Path) -> None:
    folder = saved / "sharded"
    tensors = read_headers(folder)
    assert by_us(tensors) == by_safetensors(folder / A) | by_safetensors(folder / B)
    positions = [(info.file, info.offset, info.nbytes) for info in tensors.values()]
    assert positions == sorted(positions) and {file for file, _, _ in positions} == {
        folder / A,
        folder / B,
    }


def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    size = 1 << 36  # 64 GiB of hole: read into memory, it would end this process
    header = file_bytes({"a": entry(0, size, (size // 4,))}, 0)
    path.write_bytes(header)
    os.truncate(path, len(header) + size)
    status = path.stat()
    stamp = FileStamp(status.st_size, status.st_mtime_ns)
    assert read_file_header(path)[0]["a"] == TensorInfo(
        "a", "F32", (size // 4,), path, len(header), size, stamp
    )


@pytest.mark.parametrize(
    "header",
    [
        {"b": entry(4, 8, [1]), "a": entry(0, 4, [1])},  # not in offset order
        {"full": entry(), "first": entry(0, 0, [0]), "last": entry(8, 8, [3, 0])},
        {"a": entry(), "b": entry(8, 8, [0, 2**40, 2**40])},
        {"a": entry(0, 8, [], "F64")},
        {"": entry(), "__metadata__": {}},
        b'  {"a-0":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  ',
        b'{"\\ud83d\\ude00":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_unusual_files_that_safetensors_reads_are_read(
    tmp_path: Path, header: bytes | dict[str, object]
) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(file_bytes(header))
    assert by_us(read_file_header(path)[0]) == by_safetensors(path)


NOT_VALID = "its header is not valid"
RAW_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes long"),
    "seven bytes": (b"\1" + bytes(6), "7 bytes long"),
    "header past the end": (file_bytes({"a": entry()})[:-20], "and the file has"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "and may have 100000000"),
    "no header": (bytes(8), NOT_VALID),
    "an HTML page": (b"<!DOCTYPE html><html>Sign in", "and may have 100000000"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "and may have 100000000",
    ),
    "truncated": (file_bytes({"a": entry()})[:-1], NOT_VALID),
    "trailing byte": (file_bytes({"a": entry()}) + b"\0", NOT_VALID),
}
BAD_HEADERS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "not UTF-8": (b'{"\xff": 1}', NOT_VALID),
    "surrogate bytes": (b'{"\xed\xa0\x80": 1}', NOT_VALID),
    "byte order mark": (b"\xef\xbb\xbf{}", NOT_VALID),
    "not JSON": (b'{"a": }', NOT_VALID),
    "two values": (b"{} {}", NOT_VALID),
    "padded with zeros": (b"{}\0\0", NOT_VALID),
    "raw newline in a name": (b'{"a\nb": 1}', NOT_VALID),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", NOT_VALID),
    "half a surrogate pair": (json.dumps({"\ud800": entry()}).encode(), NOT_VALID),
    "an array": (b"[1]", NOT_VALID),
    "null": (b"null", NOT_VALID),
    "deep arrays": (b"[" * 100_000, NOT_VALID),
    "deep objects": (b'{"a":' * 100_000, NOT_VALID),
    "tensor twice": (b'{"a": 1, "b": 2, "b": 3}', NOT_VALID),
    "field twice": (
        b'{"a": {"dtype": "F32", "shape": [2], "shape": [2]}}',
        NOT_VALID,
    ),
    "metadata twice": (
        b'{"__metadata__": {}, "__metadata__": {}}',
        NOT_VALID,
    ),
    "metadata list": ({"__metadata__": ["pt"], "a": entry()}, NOT_VALID),
    "metadata null": ({"__metadata__": None, "a": entry()}, "__metadata__ is None"),
    "metadata number": ({"__metadata__": {"step": 1}, "a": entry()}, NOT_VALID),
    "entry number": ({"a": 1}, NOT_VALID),
    "entry list": ({"a": ["F32", [2], [0, 8]]}, "is described by"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, NOT_VALID),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, NOT_VALID),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, NOT_VALID),
    "one field more": ({"a": entry(scale=2)}, "is described by"),
    "tensor twice, the same": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "the key 'a' is there twice",
    ),
    "no elements, and a length of 2**63": (
        {"a": entry(), "b": entry(8, 8, [0, 2**63])},
        "over 63 bits",
    ),
    "dtype number": ({"a": entry(dtype=32)}, NOT_VALID),
    "dtype list": ({"a": entry(dtype=["F32"])}, NOT_VALID),
    "shape number": ({"a": entry(shape=2)}, NOT_VALID),
    "shape text": ({"a": entry(shape="2")}, NOT_VALID),
    "shape bool": ({"a": entry(0, 8, [2, True])}, NOT_VALID),
    "shape float": ({"a": entry(0, 8, [2.0])}, NOT_VALID),
    "shape negative": ({"a": entry(0, 8, [-2])}, NOT_VALID),
    "shape nested": ({"a": entry(0, 8, [[2]])}, NOT_VALID),
    "shape past 64 bits": ({"a": entry(), "b": entry(8, 8, [0, 2**70])}, NOT_VALID),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, NOT_VALID),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
        NOT_VALID,
    ),
    "offsets object": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": {"0": 8}}},
        NOT_VALID,
    ),
    "offset bool": ({"a": entry(False, 8)}, NOT_VALID),
    "offset float": ({"a": entry(0, 8.0)}, NOT_VALID),
    "offset text": ({"a": entry("0", 8)}, NOT_VALID),
    "offset negative": ({"a": entry(-8, 0)}, NOT_VALID),
    "offset -0": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', NOT_VALID),
    "offset NaN": ({"a": entry(float("nan"), 8)}, NOT_VALID),
    "unknown dtype": (
        {"a": entry(dtype="F8_E8M0", shape=[8])},
        "dtype 'F8_E8M0', and must have one of BOOL, U8",
    ),
    "lower-case dtype": ({"a": entry(dtype="f32")}, NOT_VALID),
    "begin after end": ({"a": entry(8, 0)}, NOT_VALID),
    "end past the file": ({"a": entry(0, 12, [3])}, NOT_VALID),
    "shape too small": ({"a": entry(0, 8, [1])}, NOT_VALID),
    "shape too large": ({"a": entry(0, 8, [3])}, NOT_VALID),
    "scalar too small": ({"a": entry(0, 8, [])}, NOT_VALID),
    "product past 64 bits": ({"a": entry(0, 8, [2**62, 2**62])}, NOT_VALID),
    "product past 64 bits, then 0": (
        {"a": entry(), "b": entry(8, 8, [2**40, 2**40, 0])},
        NOT_VALID,
    ),
    "product of a million lengths": (
        {"a": entry(0, 8, [2**62] * 1_000_000)},
        NOT_VALID,
    ),
    "overlap": ({"a": entry(), "b": entry(4, 8, [1])}, NOT_VALID),
    "the same bytes": ({"a": entry(), "b": entry()}, NOT_VALID),
    "hole at the start": ({"a": entry(4, 8, [1])}, NOT_VALID),
    "hole in the middle": (
        {"a": entry(0, 3, [3], "U8"), "b": entry(4, 8, [1])},
        NOT_VALID,
    ),
    "hole at the end": ({"a": entry(0, 4, [1])}, NOT_VALID),
    "data and no tensors": ({}, NOT_VALID),
    "a name of many lines": ({"a\n\x1b[2J" * 10_000: entry(8, 0)}, NOT_VALID),
    "a name of lone lines": ({"a\u2028b\x85": entry(8, 0)}, NOT_VALID),
}


@pytest.mark.parametrize(
    ("content", "fragment"),
    [pytest.param(*case, id=name) for name, case in RAW_FILES.items()]
    + [
        pytest.param(file_bytes(header), fragment, id=name)
        for name, (header, fragment) in BAD_HEADERS.items()
    ],
)
def test_a_damaged_file_is_rejected(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    rejection_of(path, fragment, lambda: read_file_header(path))
    rejection_of(path, fragment, lambda: read_headers(tmp_path))


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 100_000_100)
    rejection_of(
        path, "claims 100000001 bytes, and may have 100000000", lambda: read_file_header(path)
    )


@pytest.mark.parametrize("read", [read_file_header, read_json])
def test_what_is_not_a_readable_file_is_rejected(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, broken, good = tmp_path / "pipe", tmp_path / "broken", tmp_path / "good"
    os.mkfifo(pipe)
    broken.symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "absent", tmp_path, pipe, broken, tmp_path / ("x" * 5000)):
        rejection_of(path, "is missing or is not a file", lambda path=path: read(path))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    good.write_bytes(file_bytes({"a": entry()}))
    monkeypatch.setattr(headers, "open", denied, raising=False)
    rejection_of(good, "cannot be read (Permission denied)", lambda: read(good))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "it is not valid JSON"),
        (b'{"a": 1,}', "it is not valid JSON"),
        (b'{"a": "\xe9"}', "it is not UTF-8 text from byte 7"),
        (b'{"a": "\\udfff"}', "it is not valid JSON"),
        (b'["a"]', "it is ['a'], and must be a JSON object"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is there twice"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep"),
    ],
)
def test_bad_json_is_rejected(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    rejection_of(path, fragment, lambda: read_json(path))


def test_json_is_read_as_json_does(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    value = {"a": [1, -2, 0.5, True, None, float("inf")], "b": {"a": "é 😀 -0"}, "c": -0.0}
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    os.truncate(path, 100_000_001)
    rejection_of(path, "is 100000001 bytes long", lambda: read_json(path))


def test_what_safetensors_writes_is_canonical(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the file with a name that has a newline, which JSON writes with an escape."""
    monkeypatch.setattr(headers, "_validated", None)
    by_file = {path: path.read_bytes().count(b"\\n") for path in saved.rglob("*.safetensors")}
    assert sorted(by_file.values()) == [0, 1, 1]
    for path, escapes in by_file.items():
        if not escapes:
            assert read_file_header(path)[1] == {"format": "pt"}


def test_no_heavy_package_is_imported() -> None:
    code = (
        "import sys; import exaone_bridge.checkpoint.hf.headers;"
        "assert not {'torch', 'numpy', 'transformers', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
