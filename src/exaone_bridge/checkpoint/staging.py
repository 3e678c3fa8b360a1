"""Output folders that are there whole, or not at all. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from exaone_bridge.errors import CheckpointError

__all__ = ["as_usual", "refuse_existing", "staged"]


def refuse_existing(target: Path) -> None:
    """Raise before any work is done if the output is there already.

    Raises:
        CheckpointError: the target exists, or the folder it belongs into does not.
    """
    if target.exists() or target.is_symlink():
        raise CheckpointError(target, "the output exists already", remedy="name another folder, or remove this one")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(target, "the folder it belongs into does not exist", remedy="create that folder first")


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into; it takes the target's name when the body ends, and goes if it fails.

    Raises:
        CheckpointError: the target exists, before or after.
    """
    refuse_existing(target)
    parent = target.absolute().parent
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=parent))
    try:
        yield folder
        as_usual(folder)
        _flush(folder)
        refuse_existing(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def as_usual(path: Path) -> None:
    """Permissions as the umask has them; mkdtemp's and safetensors' are for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
