"""Which local folder a Hugging Face model name and a revision mean. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from exaone_bridge.errors import CheckpointError

__all__ = ["is_hub_id", "snapshot_folder"]

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name

_NOT_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")


def is_hub_id(path: Path) -> bool:
    """Return whether a path that does not exist looks like the id of a model on the Hub."""
    there = path.exists() or path.parent.is_dir()
    return not there and _HUB_ID.fullmatch(str(path)) is not None


def snapshot_folder(name: str | Path, revision: str | None = None, **download: Any) -> Path:
    """Return a local folder as it is, or the snapshot of a model on the Hugging Face Hub.

    Config, tokenizer and weights of one model must all come from the folder that this returns.

    Args:
        name: a folder, or the id of a model on the Hub, "owner/name".
        revision: a commit, branch or tag; None: `main`.
        download: further arguments of `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: the snapshot is neither in the cache nor can it be downloaded.
    """
    if (folder := Path(name)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    reasons: list[Exception] = []
    # With a commit, snapshot_download (1.33.0) asks the Hub even where it is offline.
    for local in ({}, {"local_files_only": True}):
        arguments = {"revision": revision, "ignore_patterns": list(_NOT_WEIGHTS)}
        try:
            return Path(snapshot_download(str(name), **arguments | download | local))
        except Exception as error:  # of the network, the Hub, the name or the cache
            reasons.append(error)
    wanted = "" if revision is None else f" of revision {revision}"
    command = f"hf download {name}" + ("" if revision is None else f" --revision {revision}")
    raise CheckpointError(
        folder,
        f"there is no such folder, and a snapshot{wanted} is neither in the cache of the Hugging "
        f"Face Hub nor can it be downloaded ({type(reasons[0]).__name__})",
        remedy=f"run `{command}` where the Hub can be reached, or name a folder",
    ) from reasons[0]
