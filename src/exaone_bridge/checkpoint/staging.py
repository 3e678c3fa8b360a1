"""Output folders that appear complete or not at all. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
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
from exaone_bridge.patches.environment import warn_once

__all__ = [
    "check_new_output",
    "check_space",
    "flush_file",
    "full_disk_as_output_error",
    "partial_folder",
    "resumable",
    "staged",
    "sync_to_disk",
    "target_of",
    "use_umask_permissions",
]

# Of flock on Lustre without -o flock, and of fsync of a folder on some FUSE and network disks.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of a rename where it is not possible, as between mount points and on object stores.
_NO_RENAME = (errno.EXDEV, errno.ENOTSUP, errno.ENOSYS)
_INSIDE = ".partial"  # in an existing target
_IN_EMPTY_DISKS = ("lost+found",)
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
# Without these a folder is no checkpoint. They are written in this order.
_LAST = (
    ".metadata",
    "run_config.yaml",
    "latest_checkpointed_iteration.txt",
    _INDEX,
    "config.json",
)
_LOCK_ATTEMPTS, _LOCK_INTERVAL = 20, 0.1  # seconds
_INVALID_INPUT = (CheckpointError, PlanError, UnmappedTensors, UnsupportedConfig, UnsupportedLayout)


def check_new_output(target: Path) -> None:
    """Raise if an output exists already, or cannot be created; a folder is, to find out.

    An empty folder, such as the mount point of a container, is accepted.

    Raises:
        CheckpointError: It exists already, or there is no folder to create it in.
        OutputError: That folder cannot be written.
    """
    if not _is_empty_folder(target) and (target.exists() or target.is_symlink()):
        raise CheckpointError(
            target, "the output exists already", remedy="name another folder, or remove this one"
        )
    if not target.absolute().parent.is_dir():
        raise CheckpointError(
            target, "the folder to create it in does not exist", remedy="create that folder first"
        )
    try:
        Path(tempfile.mkdtemp(prefix=_INSIDE, dir=_place_of(target))).rmdir()
    except OSError as error:
        if error.errno in _DISK_FULL:  # what an earlier run has written may be enough
            return
        raise OutputError(
            target,
            f"cannot be created ({error.strerror or error})",
            remedy="change the permissions of the folder that it is to be in, or name another one",
        ) from error


def _is_empty_folder(target: Path) -> bool:
    """Return whether a folder has nothing but what this run or an earlier one has staged in it."""
    names = [path.name for path in target.iterdir()] if target.is_dir() else ["a file"]
    return all(name.startswith(_INSIDE) or name in _IN_EMPTY_DISKS for name in names)


def _place_of(target: Path) -> Path:
    """Return the folder that an output is staged in: itself if it exists, or else its parent."""
    return target.resolve() if target.is_dir() else target.absolute().parent


def _publish(folder: Path, target: Path) -> None:
    """Give the target's name to a complete folder, once all of it is on the disk."""
    use_umask_permissions(folder)
    for path in [*folder.rglob("*"), folder]:
        sync_to_disk(path)
    check_new_output(target)
    if target.is_dir():
        return _move_files(folder, target)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        target.mkdir()
        _move_files(folder, target)
    sync_to_disk(target.absolute().parent)


def _move_files(folder: Path, target: Path) -> None:
    """Move a complete folder's files into an existing one; those that make it whole are the last.

    Weights that the folder replaces are removed, index and config first, so that old and new
    weights are never taken for one model.
    """
    files = sorted((path for path in folder.rglob("*") if not path.is_dir()), key=_moving_order)
    new = {str(path.relative_to(folder)) for path in files}
    if any(_WEIGHTS.fullmatch(name) for name in new):
        for path in sorted(target.iterdir(), key=_moving_order, reverse=True):
            is_old = _WEIGHTS.fullmatch(path.name) and path.name not in new
            if is_old or path.name == _INDEX or (path.name in _LAST and path.name in new):
                path.unlink()
    for path in files:
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        use_umask_permissions(path)
        sync_to_disk(path)
        _move_file(path, place)
    shutil.rmtree(folder)
    sync_to_disk(target)


def _moving_order(path: Path) -> int:
    return _LAST.index(path.name) if path.name in _LAST else -1


def _move_file(path: Path, place: Path) -> None:
    try:
        path.replace(place)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        place.unlink(missing_ok=True)  # it may be a link
        shutil.copyfile(path, place)
        sync_to_disk(place)
        path.unlink()


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Create a folder that is renamed to `target` at the end of the body, or removed if it raises.

    Yields:
        The folder, which is beside `target`, or inside it if it is an empty folder.

    Raises:
        CheckpointError: The target exists, before or after the body.
        OutputError: The disk is full.
    """
    check_new_output(target)
    with full_disk_as_output_error(target):
        prefix = f"{_INSIDE}-" if target.is_dir() else f".{target.name}.partial-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=_place_of(target)))
        try:
            yield folder
            _publish(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def partial_folder(target: Path) -> Path:
    """Return where `resumable` writes an output until it is complete: inside an existing one."""
    return _place_of(target) / (_INSIDE if target.is_dir() else f".{target.name}.partial")


def target_of(partial: Path) -> Path:
    """Return the output that a folder will be: the inverse of `partial_folder`."""
    if partial.name == _INSIDE:
        return partial.parent
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
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
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
def resumable(target: Path, *, merge: bool = False) -> Iterator[Path]:
    """Create or reopen a folder that is renamed to `target` at the end of the body.

    If the body raises because its input is invalid, the folder is removed; after any other
    exception, or if the process is killed, it stays for the next run.

    Args:
        target: The output.
        merge: Accept an existing folder: it keeps its other files, and gets the new ones at the
            end of the body.

    Yields:
        `partial_folder(target)`, with the safetensors files that an earlier run has left.

    Raises:
        CheckpointError: The target exists, before or after the body, or another process writes it.
        OutputError: The disk is full.
    """
    merge = merge and target.is_dir()
    if not merge:
        check_new_output(target)
    folder = partial_folder(target)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, target)
        if not merge:
            check_new_output(target)  # by the process that had the lock
        for path in folder.iterdir():  # only safetensors files are compared before they are kept
            if path.suffix != ".safetensors":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            with full_disk_as_output_error(target):
                yield folder
                (_move_files if merge else _publish)(folder, target)
        except _INVALID_INPUT:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, target: Path) -> None:
    # The ranks of a run that was killed end a moment after it, and keep its lock until then.
    for _ in range(_LOCK_ATTEMPTS):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            return warn_once(
                f"{target.absolute().parent} takes no locks ({error.strerror}): "
                "a second process that wrote the same output would not be noticed"
            )
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
        flush_file(descriptor)
    finally:
        os.close(descriptor)


def flush_file(descriptor: int) -> None:
    """Wait until an open file or folder is on the disk, if its file system can say so."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        warn_once(
            f"the output's file system does not confirm what is on the disk ({error.strerror}): "
            "the output may be incomplete if the machine fails within the next minute"
        )


def use_umask_permissions(path: Path) -> None:
    """Set the permissions that the umask gives; mkdtemp gives them to the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
