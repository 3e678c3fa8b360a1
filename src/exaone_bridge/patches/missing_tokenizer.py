"""Lets our models be converted without a tokenizer: without its files, or without its code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from exaone_bridge.models import is_supported
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.hf_files import has_tokenizer, tokenizer_needs_code

__all__ = ["load_tokenizer", "save_megatron_model"]


def _lacks_tokenizer(folder: object, trust_remote_code: bool) -> bool:
    path = Path(str(folder))
    return path.is_dir() and (
        not has_tokenizer(path) or (tokenizer_needs_code(path) and not trust_remote_code)
    )


def _has_config(hf_pretrained: Any, folder: object) -> bool:
    return "_config" in vars(hf_pretrained) or (Path(str(folder)) / "config.json").is_file()


@patch(
    "megatron.bridge.models.hf_pretrained.causal_lm:PreTrainedCausalLM._load_tokenizer",
    version="Megatron-Bridge 0.6.2",
    reason="It raises for a folder without tokenizer files when a model is exported; None is "
    "accepted wherever the tokenizer is used. So it does where the tokenizer needs remote code.",
)
def load_tokenizer(original: Callable[..., Any], self: Any) -> Any:
    """Load the tokenizer, or return None for a supported model in a local folder without one."""
    folder = self.model_name_or_path
    lacks_tokenizer = _lacks_tokenizer(folder, self.trust_remote_code)
    if lacks_tokenizer and _has_config(self, folder) and is_supported(self.config):
        return None
    return original(self)


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.save_megatron_model",
    version="Megatron-Bridge 0.6.2",
    reason="It builds the tokenizer of hf_tokenizer_path, and raises for a folder without "
    "tokenizer files when a model is imported; with None it builds none.",
)
def save_megatron_model(
    original: Callable[..., None],
    self: Any,
    model: Any,
    path: Any,
    hf_tokenizer_path: Any = None,
    *args: object,
    **kwargs: object,
) -> None:
    """Save a Megatron checkpoint, without a tokenizer if a supported model's folder has none."""
    config = getattr(self.hf_pretrained, "config", self.hf_pretrained)
    if (
        hf_tokenizer_path is not None
        and is_supported(config)
        and _lacks_tokenizer(hf_tokenizer_path, self.trust_remote_code)
    ):
        hf_tokenizer_path = None
    original(self, model, path, hf_tokenizer_path, *args, **kwargs)
