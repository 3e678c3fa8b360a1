"""Output folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint import staging
from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.shards import ShardWriter, shard_layout
from exaone_bridge.checkpoint.staging import (
    check_new_output,
    partial_folder,
    resumable,
    staged,
    target_of,
)
from exaone_bridge.errors import CheckpointError
from exaone_bridge.patches import environment

MODE = stat.S_IMODE


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_staged_folder_is_renamed_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "output"
    with staged(target) as folder:
        assert folder.is_dir() and folder.parent == tmp_path and folder != target
        assert folder.name.startswith(".output.partial-") and not any(folder.iterdir())
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"bytes")
        assert not target.exists()
    assert names_in(tmp_path) == ["output", "output/deep", "output/deep/file"]
    assert (target / "deep" / "file").read_bytes() == b"bytes"


def test_staged_accepts_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("output")) as folder:
        (folder / "file").write_text("")
    assert names_in(tmp_path) == ["output", "output/file"]


def stage(target: Path, body: Callable[[Path], object]) -> None:
    with staged(target) as folder:
        body(folder)


def must_not_run(folder: Path) -> None:
    pytest.fail("the body must not run")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a"), KeyboardInterrupt(), SystemExit(1), CheckpointError("a", "b", remedy="c")],
)
def test_staged_leaves_nothing_after_an_exception(error: BaseException, tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        stage(tmp_path / "output", half)
    assert caught.value is error and names_in(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link to a folder", "link to nowhere"])
def test_staged_rejects_an_existing_target(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"
    if kind.startswith("link"):
        write_model(tmp_path / "real", 1, "precious")
        target.symlink_to("real" if kind == "link to a folder" else "nowhere")
    elif kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "file").write_text("precious")
    before = names_in(tmp_path)
    with pytest.raises(
        CheckpointError, match="the output exists already; name another folder"
    ) as caught:
        stage(target, must_not_run)
    assert caught.value.path == target and names_in(tmp_path) == before
    assert target.is_symlink() == kind.startswith("link")
    if not kind.startswith("link"):
        assert (target if kind == "file" else target / "file").read_text() == "precious"


@pytest.mark.parametrize("parent", ["missing", "a file", "a link to nowhere"])
def test_staged_rejects_a_target_without_parent(parent: str, tmp_path: Path) -> None:
    if parent == "a file":
        (tmp_path / "parent").write_text("")
    elif parent == "a link to nowhere":
        (tmp_path / "parent").symlink_to("nowhere")
    before = names_in(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; create that folder first"):
        stage(tmp_path / "parent" / "output", must_not_run)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_staged_does_not_replace_a_target_created_meanwhile(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"

    def meanwhile(folder: Path) -> None:
        if kind == "link":
            target.symlink_to("nowhere")
        else:
            target.mkdir()
            (target / "file").write_text("precious")

    with pytest.raises(CheckpointError, match="the output exists already"):
        stage(target, meanwhile)
    assert names_in(tmp_path) == (["output", "output/file"] if kind == "folder" else ["output"])
    assert target.is_symlink() == (kind == "link")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_staged_folder_has_the_permissions_of_mkdir(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "mkdir").mkdir()
        with staged(tmp_path / "output") as folder:
            (folder / "file").write_text("")
        assert os.umask(mask) == mask  # unchanged
    finally:
        os.umask(before)
    assert MODE((tmp_path / "output").stat().st_mode) == MODE((tmp_path / "mkdir").stat().st_mode)


def test_two_outputs_can_be_staged_at_once(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as a, staged(tmp_path / "b") as b:
        (a / "of a").write_text("")
        (b / "of b").write_text("")
    assert names_in(tmp_path) == ["a", "a/of a", "b", "b/of b"]


def test_check_new_output_creates_nothing(tmp_path: Path) -> None:
    check_new_output(tmp_path / "output")
    assert names_in(tmp_path) == []


# --- folders that exist, and renames that are not possible ---


def on_other_devices(monkeypatch: pytest.MonkeyPatch, mounts: list[Path]) -> None:
    """Let renames over the border of these folders raise EXDEV, as those of mount points do."""
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def rename(source: Path, place: Path, original: Callable[..., None] = original) -> None:
            for mount in mounts:
                inside = [mount in Path(path).resolve().parents for path in (source, place)]
                if inside[0] != inside[1] or mount in (Path(source), Path(place)):
                    raise OSError(errno.EXDEV, "Invalid cross-device link")
            original(source, place)

        monkeypatch.setattr(os, name, rename)


def write_model(folder: Path, shards: int, value: str) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(shards):
        name = f"model-0000{number + 1}-of-0000{shards}.safetensors"
        (folder / (name if shards > 1 else "model.safetensors")).write_text(value)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(value)
    (folder / "config.json").write_text(value)


@pytest.mark.parametrize("kind", ["folder", "link", ".", "mount point"])
def test_an_existing_folder_gets_the_files_at_the_end(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "notes").write_text("kept")
    write_model(real, 3, "old")
    target = real
    if kind == "link":
        target = tmp_path / "link"
        target.symlink_to("real")
    elif kind == ".":
        monkeypatch.chdir(real)
        target = Path()
    elif kind == "mount point":
        on_other_devices(monkeypatch, [real])
    with resumable(target, merge=True) as folder:
        assert folder == partial_folder(target) == real / ".partial"
        assert target_of(folder) == real
        write_model(folder, 2, "new")
        assert (real / "config.json").read_text() == "old"
    assert names_in(real) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "notes",
    ]
    assert {path.read_text() for path in real.iterdir()} == {"new", "kept"}
    assert names_in(tmp_path) == sorted(
        [f"real/{name}" for name in names_in(real)]
        + ["real"]
        + (["link"] if kind == "link" else [])
    )


@pytest.mark.parametrize("kind", ["folder", "link", ".", "mount point"])
@pytest.mark.parametrize("stage_output", [staged, resumable])
def test_an_empty_folder_becomes_the_output(
    stage_output: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container's mount point is; the disk that is mounted may have lost+found."""
    real = tmp_path / "real"
    (real / "lost+found").mkdir(parents=True)
    target = real
    if kind == "link":
        target = tmp_path / "link"
        target.symlink_to("real")
    elif kind == ".":
        monkeypatch.chdir(real)
        target = Path()
    elif kind == "mount point":
        on_other_devices(monkeypatch, [real])
    with stage_output(target) as folder:
        assert folder.parent == real
        write_model(folder, 1, "new")
        assert not (real / "config.json").exists()
    assert names_in(real) == ["config.json", "lost+found", "model.safetensors"]
    with pytest.raises(CheckpointError, match="the output exists already"):
        check_new_output(target)


@pytest.mark.parametrize(("old", "new"), [(3, 3), (3, 1), (1, 3), (1, 1)])
def test_old_and_new_weights_are_never_taken_for_one_model(
    old: int, new: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files move one by one; before each move, the folder lacks its config or its index."""
    write_model(tmp_path, old, "old")
    seen: list[set[str]] = []
    replace = os.replace

    def watched(source: Path, place: Path) -> None:
        seen.append(set(names_in(tmp_path)))
        replace(source, place)

    monkeypatch.setattr(os, "replace", watched)
    with resumable(tmp_path, merge=True) as folder:
        write_model(folder, new, "new")
    assert len(seen) == new + (2 if new > 1 else 1)
    assert not any("config.json" in names for names in seen)
    assert not any("model.safetensors.index.json" in names for names in seen[:-1])
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


def test_weights_alone_get_their_index_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, 2, "old")
    places: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (places.append(Path(b).name), replace(a, b)))
    with resumable(tmp_path, merge=True) as folder:
        write_model(folder, 2, "new")
        (folder / "config.json").unlink()
    assert len(places) == 3 and places[-1] == "model.safetensors.index.json"
    assert (tmp_path / "config.json").read_text() == "old"


@pytest.mark.parametrize("stage_output", [staged, resumable])
def test_without_renames_the_files_move_one_by_one(
    stage_output: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on object stores that are mounted; index and config are the last that are written."""
    target, written = tmp_path / "output", []
    on_other_devices(monkeypatch, [target])
    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: (written.append(b.name), copy(a, b)))
    with stage_output(target) as folder:
        write_model(folder, 2, "new")
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("new")
    assert written[-2:] == ["model.safetensors.index.json", "config.json"] and len(written) == 5
    assert (target / "deep" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_an_interrupted_merge_leaves_the_existing_folder_as_it_was(tmp_path: Path) -> None:
    write_model(tmp_path, 2, "old")
    merging = resumable(tmp_path, merge=True)
    write_model(merging.__enter__(), 2, "new")
    assert not merging.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert {path.read_text() for path in tmp_path.glob("*.*") if path.is_file()} == {"old"}
    with resumable(tmp_path, merge=True) as folder:
        assert len(list(folder.glob("*.safetensors"))) == 2  # an earlier run's are kept
        write_model(folder, 2, "new")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"new"}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_written_with_one_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(staging.fcntl, "flock", _fails_with(code))
    for name in ("a", "b"):
        with resumable(tmp_path / name) as folder:
            (folder / "model.safetensors").write_text("")
    assert names_in(tmp_path) == ["a", "a/model.safetensors", "b", "b/model.safetensors"]
    assert capsys.readouterr().err == (
        f"exaone-bridge: {tmp_path} takes no locks ({os.strerror(code)}): a second process that "
        "wrote the same output would not be noticed.\n"
    )


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("way", [staged, resumable])
def test_a_file_system_without_fsync_is_written_with_one_warning(
    way: Callable[[Path], AbstractContextManager[Path]],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(staging.os, "fsync", _fails_with(code))
    monkeypatch.setattr(environment, "_warned", set())
    with way(tmp_path / "output") as folder:
        layout = shard_layout([TensorSpec("a", "U8", (1,))], "model.safetensors")
        with ShardWriter.create(folder, layout) as writer:
            writer.put("a", [memoryview(b"1")])
    assert names_in(tmp_path) == ["output", "output/model.safetensors"]
    assert capsys.readouterr().err.count("does not confirm what is on the disk") == 1


@pytest.mark.parametrize("name", ["flock", "fsync"])
def test_other_errors_of_locks_and_fsync_are_raised(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.fcntl if name == "flock" else os, name, _fails_with(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), resumable(tmp_path / "output"):
        pass
    assert names_in(tmp_path) == [".output.partial"]


def _fails_with(code: int) -> Callable[..., None]:
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fails
