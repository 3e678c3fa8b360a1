"""The header reader against safetensors, every kind of damage, and random damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from exaone_bridge.checkpoint.hf import headers
from exaone_bridge.checkpoint.hf.headers import (
    FileStamp,
    TensorInfo,
    read_file_header,
    read_headers,
    read_json,
)
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.dtypes import DTYPE_BYTES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(
    begin: object = 0, end: object = 8, shape: object = (2,), dtype: object = "F32", **more: object
) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def file_bytes(header: bytes | dict[str, object], data_bytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(data_bytes))


def refusal(path: Path, fragment: str, read: Callable[[], object]) -> str:
    """The message of the CheckpointError of `read`: one line about `path` with `fragment`."""
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert caught.value.path == path and message.startswith(f"{path}: ")
    assert (
        len(message.splitlines()) == 1
        and message.endswith(".")
        and len(message) < 1000 + len(str(path))
    )
    assert message.isprintable()
    assert fragment in message
    return message


def by_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes, from the two readers of the safetensors package."""
    data = {name: bytes(tensor["data"]) for name, tensor in deserialize(path.read_bytes())}
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {
            name: (s.get_dtype(), tuple(s.get_shape()), data[name]) for name, s in slices.items()
        }


def by_us(tensors: dict[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, info in tensors.items():
        with open(info.file, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.nbytes)
        assert name == info.name and len(data) == info.nbytes
        found[name] = (info.dtype, info.shape, data)
    return found


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
    for shard, held in shards.items():
        save_file(
            {name: tensors[name] for name in held},
            folder / "sharded" / shard,
            metadata={"format": "pt"},
        )
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "sharded" / INDEX).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def test_a_single_file_is_what_safetensors_says(saved: Path) -> None:
    tensors, metadata = read_file_header(saved / SINGLE)
    assert by_us(tensors) == by_safetensors(saved / SINGLE)
    assert {info.dtype for info in tensors.values()} == DTYPE_BYTES.keys()
    assert metadata == {"format": "pt", "who": "ü"}
    assert list(tensors.values()) == sorted(
        tensors.values(), key=lambda info: (info.offset, info.nbytes)
    )
    assert read_headers(saved) == tensors


def test_a_sharded_folder_is_what_safetensors_says(saved: Path) -> None:
    folder = saved / "sharded"
    tensors = read_headers(folder)
    assert by_us(tensors) == by_safetensors(folder / A) | by_safetensors(folder / B)
    places = [(info.file, info.offset, info.nbytes) for info in tensors.values()]
    assert places == sorted(places) and {place[0] for place in places} == {folder / A, folder / B}


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
    "cut short": (file_bytes({"a": entry()})[:-1], NOT_VALID),
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
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    refusal(path, fragment, lambda: read_file_header(path))
    refusal(path, fragment, lambda: read_headers(tmp_path))


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(path, 100_000_100)
    refusal(path, "claims 100000001 bytes, and may have 100000000", lambda: read_file_header(path))


@pytest.mark.parametrize("read", [read_file_header, read_json])
def test_what_is_no_readable_file_is_refused(
    tmp_path: Path, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, broken, good = tmp_path / "pipe", tmp_path / "broken", tmp_path / "good"
    os.mkfifo(pipe)
    broken.symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "absent", tmp_path, pipe, broken, tmp_path / ("x" * 5000)):
        refusal(path, "is missing or is not a file", lambda path=path: read(path))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    good.write_bytes(file_bytes({"a": entry()}))
    monkeypatch.setattr(headers, "open", denied, raising=False)
    refusal(good, "cannot be read (Permission denied)", lambda: read(good))


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
def test_bad_json_is_refused(tmp_path: Path, content: bytes, fragment: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    refusal(path, fragment, lambda: read_json(path))


def test_json_is_read_as_json_does(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    value = {"a": [1, -2, 0.5, True, None, float("inf")], "b": {"a": "é 😀 -0"}, "c": -0.0}
    path.write_text(json.dumps(value))
    assert read_json(path) == value
    os.truncate(path, 100_000_001)
    refusal(path, "is 100000001 bytes long", lambda: read_json(path))


# Folders. Each damage starts from a sound one: tensor a in A, tensor b in B.


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / A).write_bytes(file_bytes({"a": entry()}))
    (folder / B).write_bytes(file_bytes({"b": entry()}))
    write_index(folder, {"a": A, "b": B})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_both(folder: Path) -> None:
    (folder / B).write_bytes(file_bytes({"a": entry(0, 4, [1]), "b": entry(4, 8, [1])}))


def move_out(folder: Path, name: str) -> None:
    """Leaves a link to where the file now is: beside the folder."""
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def single_moved_out(folder: Path) -> None:
    (folder / SINGLE).write_bytes(file_bytes({"a": entry()}))
    move_out(folder, SINGLE)


SHARD_NAMES = [
    "",
    "..",
    "../elsewhere.safetensors",
    "/etc/passwd",
    "/tmp/x.safetensors",
    "C:\\x.safetensors",
    "pytorch_model.bin",
    "sub/x.safetensors",
    "sub\\x.safetensors",
    "x..safetensors",
    "x\0.safetensors",
    "x\n.safetensors",
]
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), INDEX, "it is not valid JSON"),
    "index an array": (lambda f: (f / INDEX).write_text("[]"), INDEX, "must be a JSON object"),
    "index with a tensor twice": (
        lambda f: (f / INDEX).write_text(f'{{"weight_map": {{"a": "{A}", "a": "{B}"}}}}'),
        INDEX,
        "the key 'a' is there twice",
    ),
    "no weight_map": (lambda f: (f / INDEX).write_text('{"metadata": {}}'), INDEX, "no weight_map"),
    "weight_map a list": (lambda f: write_index(f, [A, B]), INDEX, "no weight_map"),
    "weight_map empty": (lambda f: write_index(f, {}), INDEX, "no weight_map"),
    "shard a number": (
        lambda f: write_index(f, {"a": 1}),
        INDEX,
        "maps tensor 'a' to 1, which is not a file name",
    ),
    "shard a list": (lambda f: write_index(f, {"a": [A]}), INDEX, "which is not a file name"),
    "shard missing": (lambda f: (f / B).unlink(), INDEX, f"lists the file '{B}', which is missing"),
    "shard a folder": (lambda f: ((f / B).unlink(), (f / B).mkdir()), INDEX, "which is missing"),
    "shard with a long name": (
        lambda f: write_index(f, {"a": "x" * 5000 + ".safetensors"}),
        INDEX,
        "which is missing",
    ),
    "shard damaged": (lambda f: (f / B).write_bytes(b"\0"), B, "1 bytes long"),
    "tensor in neither file": (
        lambda f: write_index(f, {"a": A, "b": B, "c": B}),
        INDEX,
        f"tensor 'c' is in '{B}' according to this index, and is in none of the files",
    ),
    "tensor in another file": (
        lambda f: write_index(f, {"a": B, "b": A}),
        INDEX,
        f"tensor 'a' is in '{B}' according to this index, and is in '{A}'",
    ),
    "tensor not in the index": (
        lambda f: (f / A).write_bytes(file_bytes({"a": entry(0, 4, [1]), "z": entry(4, 8, [1])})),
        INDEX,
        f"tensor 'z' is missing according to this index, and is in '{A}'",
    ),
    "tensor in two files": (in_both, B, f"has tensor 'a', and so has {A}"),
    "shard linked from outside": (
        lambda f: move_out(f, B),
        B,
        "which is outside the checkpoint's folder",
    ),
    "index linked from outside": (
        lambda f: move_out(f, INDEX),
        INDEX,
        "which is outside the checkpoint's folder",
    ),
    "single file linked from outside": (
        single_moved_out,
        SINGLE,
        "which is outside the checkpoint's folder",
    ),
} | {
    f"shard named {name!r}": (
        lambda f, name=name: write_index(f, {"a": name}),
        INDEX,
        "not the plain name of a",
    )
    for name in SHARD_NAMES
}


@pytest.mark.parametrize(
    ("damage", "file", "fragment"),
    [pytest.param(*case, id=ascii(name)) for name, case in BAD_FOLDERS.items()],
)
def test_a_damaged_folder_is_refused(
    sharded: Path, damage: Callable[[Path], object], file: str, fragment: str
) -> None:
    assert list(read_headers(sharded)) == ["a", "b"]
    damage(sharded)
    refusal(sharded / file, fragment, lambda: read_headers(sharded))


def test_what_is_no_checkpoint_folder_is_refused(sharded: Path, tmp_path: Path) -> None:
    refusal(tmp_path / "absent", "is not a folder", lambda: read_headers(tmp_path / "absent"))
    refusal(sharded / A, "is not a folder", lambda: read_headers(sharded / A))
    refusal(tmp_path, f"has neither {SINGLE} nor {INDEX}", lambda: read_headers(tmp_path))
    os.mkfifo(tmp_path / SINGLE)
    refusal(tmp_path, f"has neither {SINGLE} nor {INDEX}", lambda: read_headers(tmp_path))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "b.pth", "c.ckpt"]
)
def test_pickles_are_refused_and_ignored_beside_safetensors(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    message = refusal(
        tmp_path, "rejected because loading them runs code", lambda: read_headers(tmp_path)
    )
    assert name in message and "save_pretrained" in message
    (sharded / name).write_bytes(b"\x80\x02.")
    assert list(read_headers(sharded)) == ["a", "b"]


def test_the_single_file_wins_as_in_transformers(sharded: Path) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    def by_transformers() -> list[str]:
        files, _ = _get_resolved_checkpoint_files(sharded, None, None, None, None, False)
        return sorted(files)

    for single, wanted in ((False, [A, B]), (True, [SINGLE])):
        if single:
            (sharded / SINGLE).write_bytes(file_bytes({"single": entry()}))
        assert by_transformers() == [str(sharded / name) for name in wanted]
        assert (
            sorted({str(info.file) for info in read_headers(sharded).values()}) == by_transformers()
        )


# Links: within the folder, and in the layout of the hub cache.


@pytest.fixture
def hub(sharded: Path) -> Path:
    """The snapshot folder of a hub cache, whose files all are links into blobs/."""
    blobs = sharded.parent / "models--org--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


def test_links_within_the_folder_and_to_it_are_followed(sharded: Path, tmp_path: Path) -> None:
    (sharded / "real").mkdir()
    (sharded / B).rename(sharded / "real" / "b")
    (sharded / B).symlink_to("real/b")
    (tmp_path / "alias").symlink_to(sharded)
    assert list(read_headers(sharded)) == list(read_headers(tmp_path / "alias")) == ["a", "b"]


def test_the_hub_cache_is_followed(hub: Path, tmp_path: Path) -> None:
    assert {name: info.file for name, info in read_headers(hub).items()} == {
        "a": hub / A,
        "b": hub / B,
    }
    (tmp_path / "alias").symlink_to(hub)
    assert list(read_headers(tmp_path / "alias")) == ["a", "b"]


@pytest.mark.parametrize(
    "place", ["models--org--other/blobs", "models--org--name", "models--org--name/blobs/deeper"]
)
def test_a_hub_cache_link_to_another_place_is_refused(
    hub: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "f").write_bytes((hub / A).read_bytes())
    (hub / A).unlink()
    (hub / A).symlink_to(tmp_path / place / "f")
    refusal(hub / A, "outside the checkpoint's folder", lambda: read_headers(hub))


def test_a_hub_cache_blob_that_links_on_is_refused(hub: Path, tmp_path: Path) -> None:
    blob = (hub / A).resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    refusal(hub / A, "outside the checkpoint's folder", lambda: read_headers(hub))


def test_blobs_are_no_home_to_other_folders(hub: Path) -> None:
    other = hub.parent.rename(hub.parent.parent / "copies") / hub.name
    refusal(other / INDEX, "outside the checkpoint's folder", lambda: read_headers(other))


# Random damage: this reader refuses, or agrees with safetensors. Nothing else may happen.

SOUND = {
    "__metadata__": {"format": "pt"},
    "a.weight": entry(0, 16, [2, 2]),
    "b😀": entry(16, 24, [4], "BF16"),
    "empty": entry(24, 24, [0, 3], "I8"),
    "scalar": entry(24, 32, [], "F64"),
}
AS_WRITTEN = file_bytes(json.dumps(SOUND, separators=(",", ":"), ensure_ascii=False).encode(), 32)
TOKENS = [
    *(
        "-0",
        "0",
        "8",
        "-1",
        "1e2",
        "1.0",
        "NaN",
        "Infinity",
        "true",
        "null",
        "{}",
        "[]",
        '"F32"',
        '"a.weight":1,',
    ),
    *(
        ",",
        ":",
        "{",
        "}",
        "[",
        "]",
        '"',
        " ",
        "\n",
        "\0",
        "\\",
        "\\u0061",
        "\\ud800",
        "\\udc00",
        str(2**63),
        str(2**64),
    ),
    *('"__metadata__":{},', '"x":', '"dtype":"U8",', "é", "\ufeff", "9" * 30),
]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 32, 2**31, 2**62, 2**63, 2**64 - 1, 2**64, -1]),
    st.floats(),
    st.sampled_from(["F32", "BF16", "I8", "F64", "F4", "C64", "", "\ud800", "é"]),
    st.lists(st.integers(-1, 40), max_size=4),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), st.integers(-1, 40)),
)


@st.composite
def changed_values(draw: st.DrawFn) -> bytes:
    """SOUND with some values, somewhere in it, removed, replaced, copied or moved."""
    header = json.loads(json.dumps(SOUND))
    for _ in range(draw(st.integers(1, 4))):
        at: Any = header
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.integers(0, 4)):
                at = at[key]
                continue
            match draw(st.sampled_from(["replace", "remove", "rename", "copy"])):
                case "replace":
                    at[key] = draw(LEAVES)
                case "remove":
                    del at[key]
                case "rename" if isinstance(at, dict):
                    at[draw(st.sampled_from(["x", "__metadata__", "shape", "\ud800"]))] = at.pop(
                        key
                    )
                case _:
                    at[draw(st.sampled_from(keys))] = json.loads(json.dumps(at[key]))
            break
    text = json.dumps(
        header,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([None, (",", ":")])),
    )
    return file_bytes(text.encode(errors="surrogatepass"), 32)


@st.composite
def changed_text(draw: st.DrawFn) -> bytes:
    """SOUND with pieces of its text cut out and tokens put in; the header's size is right again."""
    text = json.dumps(SOUND, ensure_ascii=draw(st.booleans()), separators=(",", ":"))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = (
            text[:at] + draw(st.sampled_from(["", *TOKENS])) + text[at + draw(st.integers(0, 3)) :]
        )
    return file_bytes(text.encode(), draw(st.sampled_from([32, 32, 32, 31, 33])))


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """The file of SOUND with bytes overwritten, inserted or removed anywhere."""
    content = bytearray(draw(st.sampled_from([file_bytes(SOUND, 32), AS_WRITTEN])))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.one_of(st.integers(0, 9), st.integers(0, len(content))))
        content[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / SINGLE


@given(content=st.one_of(changed_values(), changed_text(), changed_bytes()))
@example(content=file_bytes(SOUND, 32))
@example(content=AS_WRITTEN)
@settings(max_examples=1500, deadline=None)
def test_random_damage_is_refused_or_safetensors_agrees(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    try:
        tensors, metadata = read_file_header(scratch)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        assert content not in (file_bytes(SOUND, 32), AS_WRITTEN), "the sound file was refused"
        return
    try:
        assert by_us(tensors) == by_safetensors(scratch)
        with safe_open(scratch, framework="np") as file:
            assert metadata == (file.metadata() or {})
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")


def entry_text(name: str, dtype: str, shape: str, begin: int, end: int) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


A8 = entry_text("a", "F32", "[2]", 0, 8)
BIG = "9" * 5000
LIKE_WRITTEN = [
    A8,
    f"{A8} ",
    f" {A8}",
    f"{A8},",
    f",{A8}",
    f"{A8},{A8}",
    f"{A8}{A8}",
    f"{A8}x",
    f"{A8}}}{{",
    f'"__metadata__":{{}},{A8}',
    f'"__metadata__":{{"a":"b"}},{A8}',
    f'"__metadata__":{{"a":1}},{A8}',
    f'"__metadata__":{{"a":"b","a":"c"}},{A8}',
    f'"__metadata__":{{"a":"b",}},{A8}',
    f'"__metadata__":{{[[}},{A8}',
    f'"__metadata__":{{"\\ud800":"b"}},{A8}',
    f'"__metadata__":{{"{{":"}}"}},{A8}',
    f'"__metadata__":[],{A8}',
    f'{A8},"__metadata__":{{}}',
    A8.replace('"a"', '"\\u0061"'),
    A8.replace('"a"', '"__metadata__"'),
    A8.replace('"a"', '"a\nb"'),
    A8.replace('"a"', '"a\x7f"'),
    A8.replace('"a"', '""'),
    entry_text("a", "F32", "[02]", 0, 8),
    entry_text("a", "F32", "[2,]", 0, 8),
    entry_text("a", "F32", "[,]", 0, 8),
    entry_text("a", "F32", "[-0]", 0, 0),
    entry_text("a", "f32", "[2]", 0, 8),
    entry_text("a", "C64", "[1]", 0, 8),
    entry_text("a", "F32", f"[{BIG}]", 0, 8),
    entry_text("a", "F32", f"[0,{2**63}]", 0, 0) + "," + A8.replace('"a"', '"b"'),
    entry_text("a", "F32", f"[{2**40},{2**40},0]", 0, 0) + "," + A8.replace('"a"', '"b"'),
    entry_text("a", "F64", "[]", 0, 8),
    entry_text("a", "F32", "[1]", 4, 8) + "," + entry_text("b", "F32", "[1]", 0, 4),
    entry_text("a", "F32", "[1]", 4, 8),
    entry_text("a", "F32", "[1]", 0, 4),
    entry_text("a", "F32", "[3]", 0, 12),
    entry_text("a", "F32", "[2]", 0, 4),
    A8.replace('"dtype":"F32","shape":[2]', '"shape":[2],"dtype":"F32"'),
    A8.replace("[0,8]", "[00,8]"),
    A8.replace("[0,8]", "[-0,8]"),
    A8.replace("[0,8]", "[0,8,8]"),
    A8.replace("[0,8]}", '[0,8],"x":1}'),
    A8.replace(":", ": "),
    entry_text("a", "F32", "[1]", 0, 4) + "," + entry_text("a", "F32", "[1]", 4, 8),
    f'"__metadata__":{{"a":{"[" * 100_000}}},{A8}',
]


@pytest.mark.parametrize("text", LIKE_WRITTEN)
def test_almost_canonical_header_is_refused_or_safetensors_agrees(scratch: Path, text: str) -> None:
    test_random_damage_is_refused_or_safetensors_agrees.hypothesis.inner_test(
        scratch, file_bytes(f"{{{text}}}".encode())
    )


@given(content=st.one_of(changed_values(), changed_text(), changed_bytes()))
@example(content=AS_WRITTEN)
@settings(max_examples=300, deadline=None)
def test_canonical_headers_are_read_alike_both_ways(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers, "_validated", lambda *_: None)
        with suppress(CheckpointError):
            if found := read_file_header(scratch):
                patch.undo()
                header = content[8 : 8 + int.from_bytes(content[:8], "little")]
                stamp = next(iter(found[0].values())).stamp
                assert headers._validated(scratch, header, stamp) == found


def test_what_safetensors_writes_is_canonical(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the file with a name that has a newline, which JSON spells with an escape."""
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
