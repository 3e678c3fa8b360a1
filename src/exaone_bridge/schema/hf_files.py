"""Files beside weights and config in a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

__all__ = [
    "FOLLOW_LINKS",
    "belongs_to",
    "companion_files",
    "copy_companion_files",
    "has_tokenizer",
    "links_left_out",
    "tokenizer_needs_code",
]

FOLLOW_LINKS: Final = "EXAONE_BRIDGE_FOLLOW_LINKS"  # environment: "1" lets links leave the folder

# What a conversion does not copy; everything else goes with the model, byte for byte.
_WRITTEN = ("config.json", "*.safetensors", "*.safetensors.index.json")
_WEIGHTS = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack"),
    *("*.onnx", "*.onnx_data", "*.npz", "*.distcp", "*.incomplete", "*.lock"),
)
_FOLDERS = (".git", ".cache", ".huggingface", "__pycache__")  # of tools that download and run


def copy_companion_files(source: Path, target: Path) -> list[str]:
    """Copy everything but weights and config.json, and returns the paths inside the folder."""
    found = sorted(companion_files(source))
    for name in found:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def companion_files(folder: Path) -> Iterator[str]:
    """Yield the paths inside a folder of all files that a conversion copies.

    A subfolder with weights is another model, and links are followed as `belongs_to` says.
    """
    return (name for name, belongs in _companions(folder) if belongs)


def links_left_out(folder: Path) -> list[str]:
    """List the paths inside a folder of links that would be copied if they did not lead out."""
    return sorted(name for name, belongs in _companions(folder) if not belongs)


def _companions(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield each file's path inside the folder, and whether the file belongs to it."""
    for directory, folders, files in os.walk(folder):
        here = Path(directory)
        if here != folder and any(_is_one_of(name, (*_WRITTEN, *_WEIGHTS)) for name in files):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name not in _FOLDERS)
        others = (here / name for name in files if not _is_one_of(name, (*_WRITTEN, *_WEIGHTS)))
        for path in others:
            if path.is_file():
                yield str(path.relative_to(folder)), belongs_to(path, folder)


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def belongs_to(path: Path, folder: Path) -> bool:
    """Return whether a file, or what it links to, is in a folder.

    So is what is in the cache of the Hugging Face Hub that the folder is part of, where
    snapshots/<revision>/<file> links to ../../blobs/<hash> (huggingface_hub.file_download). Whoever
    trusts the folder lets links lead anywhere, by `FOLLOW_LINKS`: the variable reaches every rank,
    and the calls that Megatron-Bridge makes.
    """
    inside, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    is_blob = inside.parent.name == "snapshots" and (
        target.parent == inside.parent.parent / "blobs"
    )
    return is_blob or target.is_relative_to(inside) or os.environ.get(FOLLOW_LINKS) == "1"


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has any file of a tokenizer."""
    return any(
        next(folder.glob(pattern), None)
        for pattern in ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
    )


def tokenizer_needs_code(folder: Path) -> bool:
    """Return whether the tokenizer is Python code of the folder, which is never run here."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    auto_map = config.get("auto_map") if isinstance(config, dict) else None
    return "AutoTokenizer" in auto_map if isinstance(auto_map, dict) else bool(auto_map)
