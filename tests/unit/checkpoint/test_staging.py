"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from exaone_bridge.checkpoint.staging import check_new_output, staged
from exaone_bridge.errors import CheckpointError

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


@pytest.mark.parametrize(
    "kind", ["folder", "empty folder", "file", "link to a folder", "link to nowhere"]
)
def test_staged_rejects_an_existing_target(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"
    if kind.startswith("link"):
        (tmp_path / "real").mkdir()
        target.symlink_to("real" if kind == "link to a folder" else "nowhere")
    elif kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "file").write_text("precious")
    before = names_in(tmp_path)
    with pytest.raises(
        CheckpointError, match="the output exists already; name another folder"
    ) as caught:
        stage(target, must_not_run)
    assert caught.value.path == target and names_in(tmp_path) == before
    assert target.is_symlink() == kind.startswith("link")
    if not kind.startswith(("link", "empty")):
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


@pytest.mark.parametrize("kind", ["folder", "empty folder", "link"])
def test_staged_does_not_replace_a_target_created_meanwhile(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"

    def meanwhile(folder: Path) -> None:
        if kind == "link":
            target.symlink_to("nowhere")
        else:
            target.mkdir()
        if kind == "folder":
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
