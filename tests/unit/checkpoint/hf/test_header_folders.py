"""The headers of a folder: index, shards, pickles, links, the hub cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exaone_bridge.checkpoint.hf.headers import read_headers
from tests.helpers.safetensors_files import (
    INDEX,
    SINGLE,
    A,
    B,
    entry,
    file_bytes,
    rejection_of,
)

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
def test_a_damaged_folder_is_rejected(
    sharded: Path, damage: Callable[[Path], object], file: str, fragment: str
) -> None:
    assert list(read_headers(sharded)) == ["a", "b"]
    damage(sharded)
    rejection_of(sharded / file, fragment, lambda: read_headers(sharded))


def test_what_is_not_a_checkpoint_folder_is_rejected(sharded: Path, tmp_path: Path) -> None:
    rejection_of(tmp_path / "absent", "is not a folder", lambda: read_headers(tmp_path / "absent"))
    rejection_of(sharded / A, "is not a folder", lambda: read_headers(sharded / A))
    rejection_of(tmp_path, f"has neither {SINGLE} nor {INDEX}", lambda: read_headers(tmp_path))
    os.mkfifo(tmp_path / SINGLE)
    rejection_of(tmp_path, f"has neither {SINGLE} nor {INDEX}", lambda: read_headers(tmp_path))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "b.pth", "c.ckpt"]
)
def test_pickles_are_rejected_and_ignored_beside_safetensors(
    sharded: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    message = rejection_of(
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
def test_a_hub_cache_link_to_another_place_is_rejected(
    hub: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "f").write_bytes((hub / A).read_bytes())
    (hub / A).unlink()
    (hub / A).symlink_to(tmp_path / place / "f")
    rejection_of(hub / A, "outside the checkpoint's folder", lambda: read_headers(hub))


def test_a_hub_cache_blob_that_links_on_is_rejected(hub: Path, tmp_path: Path) -> None:
    blob = (hub / A).resolve()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    rejection_of(hub / A, "outside the checkpoint's folder", lambda: read_headers(hub))


def test_blobs_are_no_home_to_other_folders(hub: Path) -> None:
    other = hub.parent.rename(hub.parent.parent / "copies") / hub.name
    rejection_of(other / INDEX, "outside the checkpoint's folder", lambda: read_headers(other))
