"""A Hugging Face folder without a tokenizer is no error for our architectures.

Two places of Megatron-Bridge 0.6.2 build the tokenizer of every model, and die where the folder has none:
`PreTrainedCausalLM._load_tokenizer` (`models/hf_pretrained/causal_lm.py`) when a model is exported, and
`AutoBridge.save_megatron_model` (`models/conversion/auto_bridge.py`) when it is imported. Both accept None.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from exaone_bridge.schema.hf_files import has_tokenizer

__all__ = ["tolerate_missing_tokenizer"]


def _has_none(folder: object) -> bool:
    path = Path(str(folder))
    return path.is_dir() and not has_tokenizer(path)


def tolerate_missing_tokenizer(architectures: Collection[str]) -> None:
    """For models of these architectures in a local folder without tokenizer files, the tokenizer is None."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM

    if hasattr(PreTrainedCausalLM._load_tokenizer, "_exaone_bridge"):
        return
    load, save = PreTrainedCausalLM._load_tokenizer, AutoBridge.save_megatron_model

    def ours(config: Any) -> bool:
        return bool(set(getattr(config, "architectures", None) or ()) & set(architectures))

    @functools.wraps(load)
    def load_if_there(self: PreTrainedCausalLM) -> Any:
        if ours(self.config) and _has_none(self.model_name_or_path):
            return None
        return load(self)

    @functools.wraps(save)
    def save_without(
        self: AutoBridge,
        model: Any,
        path: Any,
        hf_tokenizer_path: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        config = getattr(self.hf_pretrained, "config", self.hf_pretrained)
        if hf_tokenizer_path is not None and ours(config) and _has_none(hf_tokenizer_path):
            hf_tokenizer_path = None
        save(self, model, path, hf_tokenizer_path, *args, **kwargs)

    load_if_there._exaone_bridge = True  # type: ignore[attr-defined]
    PreTrainedCausalLM._load_tokenizer = load_if_there
    AutoBridge.save_megatron_model = save_without
