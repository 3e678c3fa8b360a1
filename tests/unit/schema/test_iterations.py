"""Which iteration of a Megatron checkpoint is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.iterations import TRACKER, choose_iteration, is_megatron_checkpoint


def _root(folder: Path, tracked: str | None, *names: str, incomplete: tuple[str, ...] = ()) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in ("run_config.yaml", ".metadata"):
            if file == "run_config.yaml" or name not in incomplete:
                (folder / name / file).touch()
    if tracked is not None:
        (folder / TRACKER).write_text(tracked)
    return folder


@pytest.mark.parametrize(
    ("tracked", "names", "incomplete", "chosen", "message"),
    [
        ("0", ["iter_0000000"], [], "iter_0000000", "iteration 0, which latest"),
        ("0\n", ["iter_0000000", "iter_0000010"], [], "iter_0000000", "iter_0000010 is newer"),
        ("9", ["iter_0000009", "iter_10"], ["iter_10"], "iter_0000009", "iter_10 is newer"),
        ("release", ["iter_0000002", "release"], [], "release", "iteration release"),
        (None, ["iter_0000002", "iter_0000010"], [], "iter_0000010", "there is no latest"),
        (None, ["iter_2", "iter_3"], ["iter_3"], "iter_2", "iter_3 is newer and not complete"),
        (None, ["iter_2"], ["iter_2"], "iter_2", "the newest"),
        (None, [], [], "", ""),
    ],
)
def test_the_tracked_iteration_is_chosen(
    tracked: str | None,
    names: list[str],
    incomplete: list[str],
    chosen: str,
    message: str,
    tmp_path: Path,
) -> None:
    root = _root(tmp_path / "root", tracked, *names, incomplete=tuple(incomplete))
    folder, why = choose_iteration(root)
    assert folder == root / chosen
    assert message in why and bool(message) == bool(why)
    assert is_megatron_checkpoint(root) == bool(names)


def test_the_requested_iteration_is_chosen(tmp_path: Path) -> None:
    root = _root(tmp_path / "root", "0", "iter_0000000", "iter_0000010")
    assert choose_iteration(root, 10) == (root / "iter_0000010", "iteration 10")
    assert choose_iteration(root / "iter_0000010") == (root / "iter_0000010", "")


@pytest.mark.parametrize(
    ("tracked", "requested", "message"),
    [
        ("7", None, r"iteration '7' is named by latest_checkpointed_iteration\.txt.*there are: 0"),
        ("0", 3, r"iteration '3' is requested, and there is no such folder \(there are: 0\)"),
        ("", None, "iteration ''"),
    ],
)
def test_an_iteration_that_is_not_there_is_rejected(
    tracked: str, requested: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        choose_iteration(_root(tmp_path / "root", tracked, "iter_0000000"), requested)
