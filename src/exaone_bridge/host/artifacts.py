"""A Hugging Face folder without a tokenizer is no error for our architectures.

Megatron-Bridge's `save_artifacts` (`megatron/bridge/models/hf_pretrained/base.py`, 0.6.2) loads the tokenizer of every
model that it exports, and `PreTrainedCausalLM._load_tokenizer` dies where the folder has none. It does accept None.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from exaone_bridge.parts.files import has_tokenizer

__all__ = ["tolerate_missing_tokenizer"]


def tolerate_missing_tokenizer(architectures: Collection[str]) -> None:
    """For models of these architectures in a local folder without tokenizer files, the tokenizer is None."""
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

    load = PreTrainedCausalLM._load_tokenizer
    if hasattr(load, "_exaone_bridge"):
        return

    @functools.wraps(load)
    def load_if_there(self: PreTrainedCausalLM) -> Any:
        folder = Path(str(self.model_name_or_path))
        ours = set(getattr(self.config, "architectures", None) or ()) & set(architectures)
        if ours and folder.is_dir() and not has_tokenizer(folder):
            return None
        return load(self)

    load_if_there._exaone_bridge = True  # type: ignore[attr-defined]
    PreTrainedCausalLM._load_tokenizer = load_if_there
