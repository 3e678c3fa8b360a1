"""Exports a Megatron checkpoint to a temporary Hugging Face folder; leaves other paths alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exaone_bridge.checkpoint.hf.diagnose import check_is_hf_folder
from exaone_bridge.checkpoint.hf.headers import read_headers
from exaone_bridge.runtime.launch import Launcher
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.schema.iterations import (
    choose_iteration,
    is_megatron_checkpoint,
)

__all__ = ["Checkpoint", "as_hf_folder"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        name: of the path that was given.
        folder: its Hugging Face folder.
        megatron: the iteration of a Megatron checkpoint that was exported to `folder`; None if none
            was.
    """

    name: str
    folder: Path
    megatron: Path | None = None


@contextlib.contextmanager
def as_hf_folder(path: Path, launcher: Launcher, progress: Progress) -> Iterator[Checkpoint]:
    """Export a Megatron checkpoint to a temporary folder; leave a Hugging Face folder where it is.

    Raises:
        CheckpointError: the path is not a folder of readable safetensors files, or the checkpoint
            cannot be exported.
    """
    if not is_megatron_checkpoint(path):
        check_is_hf_folder(path, remedy="name a Hugging Face folder or a Megatron checkpoint")
        read_headers(path)  # what it rejects is rejected before Megatron-Core is imported
    path = path.resolve()
    if not is_megatron_checkpoint(path):
        yield Checkpoint(path.name, path)
        return
    from exaone_bridge.convert.to_hf import export_checkpoint

    iteration, why = choose_iteration(path)  # once, because a training run may write a newer one
    with launcher.folder() as work:
        progress.stage(f"exporting the Megatron checkpoint{why and f', {why}'}")
        folder = work / path.name
        launcher.subprocess(export_checkpoint, iteration, folder, progress=progress)
        yield Checkpoint(path.name, folder, iteration)
