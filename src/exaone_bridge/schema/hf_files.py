"""Files beside weights and config in a Hugging Face folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

__all__ = ["companion_files", "copy_companion_files", "has_tokenizer", "tokenizer_needs_code"]

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

    A subfolder with weights is another model, and links to files elsewhere are not followed, except
    into the cache of the Hugging Face Hub that the folder is part of.
    """
    for directory, folders, files in os.walk(folder):
        here = Path(directory)
        if here != folder and any(_is_one_of(name, (*_WRITTEN, *_WEIGHTS)) for name in files):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name not in _FOLDERS)
        others = (here / name for name in files if not _is_one_of(name, (*_WRITTEN, *_WEIGHTS)))
        for path in others:
            if path.is_file() and _belongs_to(path, folder):
                yield str(path.relative_to(folder))


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _belongs_to(path: Path, folder: Path) -> bool:
    inside, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    is_blob = inside.parent.name == "snapshots" and (
        target.parent == inside.parent.parent / "blobs"
    )
    return is_blob or target.is_relative_to(inside)


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
