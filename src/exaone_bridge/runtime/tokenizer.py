"""Loads the tokenizer of a Hugging Face folder; remote code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.hf_files import tokenizer_needs_code

__all__ = ["load_tokenizer"]


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder with Transformers.

    Raises:
        CheckpointError: it is missing, cannot be loaded, or needs code that the folder brings.
    """
    from transformers import AutoTokenizer

    if tokenizer_needs_code(folder):
        raise CheckpointError(
            folder,
            "the tokenizer needs remote code, which is not run",
            remedy="save it with a tokenizer class of Transformers",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            folder, "the tokenizer is missing or cannot be loaded", remedy="copy its files there"
        ) from error
