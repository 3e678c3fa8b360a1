"""Output folders that are there whole, or not at all. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from exaone_bridge.errors import (
    CheckpointError,
    OutputError,
    PlanError,
    UnmappedTensors,
    UnsupportedConfig,
    UnsupportedLayout,
)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk's ways of taking no more
_TRIES, _BETWEEN_TRIES = 20, 0.1  # seconds
_BAD_INPUT = (CheckpointError, PlanError, UnmappedTensors, UnsupportedConfig, UnsupportedLayout)

__all__ = [
    "FULL",
    "as_usual",
    "check_space",
    "flush_one",
    "partial_folder",
    "refuse_existing",
    "resumable",
    "staged",
]


def refuse_existing(target: Path) -> None:
    """Raise before any work is done if the output is there already.

    Raises:
        CheckpointError: the target exists, or the folder it belongs into does not.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            target, "the output exists already", remedy="name another folder, or remove this one"
        )
    if not target.absolute().parent.is_dir():
        raise CheckpointError(
            target, "the folder it belongs into does not exist", remedy="create that folder first"
        )


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush_one(path)


def _publish(folder: Path, target: Path) -> None:
    """Give a folder that is whole, and on the disk, the target's name."""
    as_usual(folder)
    _flush(folder)
    refuse_existing(target)
    folder.rename(target)
    flush_one(target.absolute().parent)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into; it takes the target's name when the body ends, and goes if it fails.

    Raises:
        CheckpointError: the target exists, before or after.
    """
    refuse_existing(target)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.absolute().parent))
    try:
        yield folder
        _publish(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def partial_folder(target: Path) -> Path:
    """Where an output that can be continued is written, until it is whole."""
    return target.absolute().parent / f".{target.name}.partial"


def check_space(target: Path, nbytes: int) -> None:
    """Refuse an output that the disk has no room for, less what an earlier run has written of it.

    Raises:
        OutputError: how much is missing.
    """
    folder = partial_folder(target)
    there = sum(path.stat().st_blocks * 512 for path in folder.glob("*")) if folder.is_dir() else 0
    free = shutil.disk_usage(target.absolute().parent).free
    if free + there < nbytes:
        problem = f"the disk has {free / 1e9:.2f} GB free, and {(nbytes - there) / 1e9:.2f} GB are still to be written"
        raise OutputError(
            target, problem, remedy="free some space, or name a folder on another disk"
        )


@contextlib.contextmanager
def resumable(target: Path) -> Iterator[Path]:
    """A folder beside `target` with what an earlier run left; it takes the target's name when the body ends.

    Where the input is bad the folder goes; after any other end of the body it stays, for the next run.

    Raises:
        CheckpointError: the target exists, before or after; or another process is writing it.
    """
    refuse_existing(target)
    folder = partial_folder(target)
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(handle, target)
        refuse_existing(target)  # by whoever held the lock
        for path in folder.iterdir():  # what is not compared before it is kept
            if path.suffix != ".safetensors":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield folder
            _publish(folder, target)
        except _BAD_INPUT:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _lock(handle: int, target: Path) -> None:
    """Nobody else writes there. The ranks of a run that was killed end a moment after it, and hold its lock so long."""
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_BETWEEN_TRIES)
    problem, remedy = (
        "another process is writing this output",
        "wait for it, or name another folder",
    )
    raise CheckpointError(target, problem, remedy=remedy)


def flush_one(path: Path) -> None:
    """Have the disk take what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_usual(path: Path) -> None:
    """Permissions as the umask has them; mkdtemp's and safetensors' are for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
