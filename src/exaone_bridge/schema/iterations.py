"""Which iteration of a Megatron checkpoint is read. No torch.

The tracker file is the commit marker of Megatron-Core and Megatron-Bridge: it is written when an
iteration is complete, and a user who rolls back writes an older one there.
"""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.errors import CheckpointError

__all__ = ["choose_iteration", "is_megatron_checkpoint", "iteration_folder"]

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"  # what Megatron-LM writes for weights without an iteration
_COMPLETE = ("run_config.yaml", ".metadata")  # torch_dist writes `.metadata` last


def choose_iteration(path: Path, iteration: int | None = None) -> tuple[Path, str]:
    """Choose the iteration of a Megatron checkpoint that is read.

    It is the requested one, or the one that the tracker file names, or without that file the newest
    complete one.

    Args:
        path: The checkpoint's folder, or that of one iteration.
        iteration: The requested one; None: none is.

    Returns:
        The folder of the iteration, and a sentence that says why it was chosen; the sentence is
        empty where there was nothing to choose from.

    Raises:
        CheckpointError: The requested or the tracked iteration is not there.
    """
    folders = _iterations(path)
    if iteration is not None:
        return _existing(path, folders, str(iteration), "is requested"), f"iteration {iteration}"
    if not folders:  # an iteration's own folder
        return path, ""
    newest = list(folders.values())[-1]
    if (path / TRACKER).is_file():
        tracked = (path / TRACKER).read_text(errors="replace").strip()
        folder = _existing(path, folders, tracked, f"is named by {TRACKER}")
        ignored = "" if folder == newest else f"; {newest.name} is newer and is not read"
        return folder, f"iteration {tracked}, which {TRACKER} names{ignored}"
    chosen = next(filter(_is_complete, reversed(folders.values())), newest)
    ignored = "" if chosen == newest else f"; {newest.name} is newer and not complete"
    return chosen, f"{chosen.name}, the newest, because there is no {TRACKER}{ignored}"


def iteration_folder(path: Path) -> Path:
    """Return the folder of the iteration that `choose_iteration` chooses.

    Raises:
        CheckpointError: The tracked iteration is not there.
    """
    return choose_iteration(path)[0]


def is_megatron_checkpoint(path: Path) -> bool:
    """Return whether a path is a Megatron checkpoint, or an iteration of one."""
    return not (path / "config.json").is_file() and (
        (path / "run_config.yaml").is_file()
        or any((each / "run_config.yaml").is_file() for each in _iterations(path).values())
    )


def _iterations(path: Path) -> dict[str, Path]:
    """Return a checkpoint's iterations, oldest first: name in the tracker file -> folder."""
    found = [
        folder for folder in path.glob("iter_*") if folder.is_dir() and folder.name[5:].isdigit()
    ]
    folders = {str(int(folder.name[5:])): folder for folder in found}
    if (path / _RELEASE).is_dir():
        folders[_RELEASE] = path / _RELEASE
    order = sorted(folders, key=lambda name: -1 if name == _RELEASE else int(name))
    return {name: folders[name] for name in order}


def _existing(path: Path, folders: dict[str, Path], name: str, why: str) -> Path:
    if name in folders:
        return folders[name]
    there = ", ".join(folders) or "none"
    raise CheckpointError(
        path,
        f"iteration {name!r} {why}, and there is no such folder (there are: {there})",
        remedy="restore it, or name one that is there with --iteration"
        if folders
        else "name a folder that `import` or a training run wrote",
    )


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _COMPLETE)
