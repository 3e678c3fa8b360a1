"""Files beside weights and config in a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

__all__ = ["COMPANION_FILES", "copy_companion_files", "has_tokenizer"]

# Files that a conversion copies byte for byte. A folder may lack any of them.
COMPANION_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*processor_config.json",
)


def copy_companion_files(source: Path, target: Path) -> list[str]:
    """Copy the companion files of a folder into another, and return their names."""
    found = sorted(
        {path for pattern in COMPANION_FILES for path in source.glob(pattern) if path.is_file()}
    )
    for path in found:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder has any file of a tokenizer."""
    return any(
        next(folder.glob(pattern), None) for pattern in ("tokenizer*", "vocab.*", "merges.txt")
    )
