"""Says where and with what a verification ran. No torch is imported before `device` is called."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["device", "revision"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def revision(folder: Path) -> str:
    """Return the Hub's commit of a downloaded folder; empty if the folder does not tell.

    The cache of huggingface_hub names its snapshots by it, `hf download --local-dir` notes it in
    `.cache/huggingface/download`, and a clone has it in `.git`.
    """
    if folder.absolute().parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    git = folder / ".git"
    try:
        head = (git / "HEAD").read_text().strip() if git.is_dir() else ""
        files = (
            folder / ".cache" / "huggingface" / "download" / "config.json.metadata",
            git / (head.removeprefix("ref: ") or "HEAD"),
        )
        lines = [head, *(file.read_text().partition("\n")[0] for file in files if file.is_file())]
    except (OSError, UnicodeDecodeError):
        return ""
    return next((line for line in lines if _COMMIT.fullmatch(line)), "")


def device() -> str:
    """Return the name of the GPU that this rank uses, or of the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
