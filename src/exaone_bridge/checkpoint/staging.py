"""Output folders that appear complete or not at all. No torch."""

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

__all__ = [
    "check_new_output",
    "check_space",
    "full_disk_as_output_error",
    "partial_folder",
    "resumable",
    "staged",
    "sync_to_disk",
    "target_of",
    "use_umask_permissions",
]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCK_ATTEMPTS, _LOCK_INTERVAL = 20, 0.1  # seconds
_INVALID_INPUT = (CheckpointError, PlanError, UnmappedTensors, UnsupportedConfig, UnsupportedLayout)


def check_new_output(target: Path) -> None:
    """Raise if an output exists already, or if there is no folder to create it in.

    Raises:
        CheckpointError: Either is the case.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(
            target, "the output exists already", remedy="name another folder, or remove this one"
        )
    if not target.absolute().parent.is_dir():
        raise CheckpointError(
            target, "the folder to create it in does not exist", remedy="create that folder first"
        )


def _publish(folder: Path, target: Path) -> None:
    """Give the target's name to a complete folder, once all of it is on the disk."""
    use_umask_permissions(folder)
    for path in [*folder.rglob("*"), folder]:
        sync_to_disk(path)
    check_new_output(target)
    folder.rename(target)
    sync_to_disk(target.absolute().parent)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Create a folder that is renamed to `target` at the end of the body, or removed if it raises.

    Yields:
        The folder, which is beside `target`.

    Raises:
        CheckpointError: The target exists, before or after the body.
        OutputError: The disk is full.
    """
    check_new_output(target)
    with full_disk_as_output_error(target):
        parent = target.absolute().parent
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=parent))
        try:
            yield folder
            _publish(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def partial_folder(target: Path) -> Path:
    """Return where `resumable` writes an output until it is complete."""
    return target.absolute().parent / f".{target.name}.partial"


def target_of(partial: Path) -> Path:
    """Return the output that a folder will be: the inverse of `partial_folder`."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))


def check_space(target: Path, nbytes: int) -> None:
    """Raise if the disk has no space for what an earlier run has not written of an output yet.

    Args:
        target: The output; what exists of it is in `partial_folder(target)`.
        nbytes: Bytes of the complete output.

    Raises:
        OutputError: It has not.
    """
    folder = partial_folder(target)
    there = sum(path.stat().st_blocks * 512 for path in folder.glob("*")) if folder.is_dir() else 0
    free = shutil.disk_usage(target.absolute().parent).free
    if free + there < nbytes:
        raise OutputError(
            target,
            f"the disk has {free / 1e9:.2f} GB free, "
            f"and {(nbytes - there) / 1e9:.2f} GB are still to be written",
            remedy="free some space, or name a folder on another disk",
        )


@contextlib.contextmanager
def full_disk_as_output_error(target: Path) -> Iterator[None]:
    """Raise OutputError where the body raises the OSError of a full disk or an exceeded quota.

    `staged` and `resumable` do so for their bodies; each rank that writes for them does so itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        continues = ", which continues" if partial_folder(target).is_dir() else ""
        raise OutputError(
            target,
            f"the disk takes no more data ({error.strerror})",
            remedy=f"free some space and run this again{continues}",
        ) from error


@contextlib.contextmanager
def resumable(target: Path) -> Iterator[Path]:
    """Create or reopen a folder that is renamed to `target` at the end of the body.

    If the body raises because its input is invalid, the folder is removed; after any other
    exception, or if the process is killed, it stays for the next run.

    Yields:
        `partial_folder(target)`, with the safetensors files that an earlier run has left.

    Raises:
        CheckpointError: The target exists, before or after the body, or another process writes it.
        OutputError: The disk is full.
    """
    check_new_output(target)
    folder = partial_folder(target)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, target)
        check_new_output(target)  # by the process that had the lock
        for path in folder.iterdir():  # only safetensors files are compared before they are kept
            if path.suffix != ".safetensors":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            with full_disk_as_output_error(target):
                yield folder
                _publish(folder, target)
        except _INVALID_INPUT:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, target: Path) -> None:
    # The ranks of a run that was killed end a moment after it, and keep its lock until then.
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOCK_INTERVAL)
    raise CheckpointError(
        target,
        "another process is writing this output",
        remedy="wait for it, or name another folder",
    )


def sync_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def use_umask_permissions(path: Path) -> None:
    """Set the permissions that the umask gives; mkdtemp gives them to the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
