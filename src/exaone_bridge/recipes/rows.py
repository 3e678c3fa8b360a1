"""Checks the JSONL files of a recipe's `dataset_root` before a run reads them. No torch.

Megatron-Bridge 0.6.2 finds a bad line when a step reads it, and does not say which one it is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from exaone_bridge.errors import ConversationError, UnsupportedConfig

__all__ = ["CONVERSATIONS", "PROMPTS", "check_rows", "has_validation"]

# Of each set, a row has at least one field.
CONVERSATIONS = ({"messages", "conversation", "conversations"},)
PROMPTS = ({"input"}, {"output"})


def check_rows(dataset_root: str | Path, fields: Collection[Collection[str]] = ()) -> None:
    """Check that training.jsonl, and validation.jsonl if it is there, have a JSON object per line.

    Args:
        dataset_root: the directory of the files.
        fields: sets of fields; a row must have one of each set.

    Raises:
        UnsupportedConfig: there is no training.jsonl.
        ConversationError: a file is empty, or a line is malformed or lacks a field.
    """
    training = Path(dataset_root) / "training.jsonl"
    if not training.is_file():
        raise UnsupportedConfig(
            "dataset_root",
            got=str(dataset_root),
            wanted="a directory with training.jsonl and validation.jsonl",
            where="recipe",
        )
    validation = training.with_name("validation.jsonl")
    for file in (training, validation) if has_validation(dataset_root) else (training,):
        state = file.stat()
        for keys, line in _kinds_of_rows(file, state.st_size, state.st_mtime_ns).items():
            for names in fields:
                if not keys & set(names):
                    raise ConversationError(
                        f"{file}, line {line}",
                        f"has the fields {', '.join(sorted(keys))}",
                        remedy=f"a row of this recipe needs {' or '.join(sorted(names))}",
                    )


def has_validation(dataset_root: str | Path) -> bool:
    """Return whether there are rows to validate on."""
    return (Path(dataset_root) / "validation.jsonl").is_file()


@functools.lru_cache(maxsize=8)
def _kinds_of_rows(file: Path, size: int, modified: int) -> Mapping[frozenset[str], int]:
    """Return the sets of fields that rows have, each with the number of its first line.

    Args:
        file: is read.
        size, modified: a change of them is another key of the cache.
    """
    found: dict[frozenset[str], int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode())  # not `loads(line)`, which guesses the encoding
            except ValueError as error:
                raise ConversationError(
                    f"{file}, line {number}",
                    f"is no JSON in UTF-8 ({error})",
                    remedy="write one JSON object on each line, without empty lines",
                ) from error
            if not isinstance(row, dict):
                raise ConversationError(
                    f"{file}, line {number}", "is no JSON object", remedy="write one on each line"
                )
            found.setdefault(frozenset(row), number)
    if not found:
        raise ConversationError(str(file), "is empty", remedy="write a JSON object on each line")
    return found
