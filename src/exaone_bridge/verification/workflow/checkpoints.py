"""Exports a Megatron checkpoint to a temporary Hugging Face folder; leaves other paths alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exaone_bridge.errors import CheckpointError
from exaone_bridge.runtime.launch import Launcher
from exaone_bridge.runtime.progress import Progress

__all__ = ["Checkpoint", "as_hf_folder", "is_megatron_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: of the path that was given.
        folder: its Hugging Face folder.
        megatron: the Megatron checkpoint that was exported to `folder`; None if none was.
    """

    name: str
    folder: Path
    megatron: Path | None = None


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether a path is a Megatron checkpoint, or an iteration of one."""
    return not (path / "config.json").is_file() and (
        (path / "run_config.yaml").is_file() or any(path.glob("iter_*/run_config.yaml"))
    )


@contextlib.contextmanager
def as_hf_folder(path: Path, launcher: Launcher, progress: Progress) -> Iterator[Checkpoint]:
    """Export a Megatron checkpoint to a temporary folder; leave a Hugging Face folder where it is.

    Raises:
        CheckpointError: the path is not a folder, or the checkpoint cannot be exported.
    """
    if not path.is_dir():
        raise CheckpointError(
            path,
            "this folder does not exist",
            remedy="name a Hugging Face folder or a Megatron checkpoint",
        )
    path = path.resolve()
    if not is_megatron_checkpoint(path):
        yield Checkpoint(path.name, path)
        return
    from exaone_bridge.convert.to_hf import export_checkpoint

    with launcher.folder() as work:
        progress.stage("exporting the Megatron checkpoint")
        folder = work / path.name
        launcher.subprocess(export_checkpoint, path, folder, progress=progress)
        yield Checkpoint(path.name, folder, path)
