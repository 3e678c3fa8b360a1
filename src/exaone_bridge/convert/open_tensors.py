"""A model's tensors by their Hugging Face names, of a Hugging Face folder or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.checkpoint.hf.source import open_source
from exaone_bridge.checkpoint.megatron.tensors import FolderSource, MegatronSource
from exaone_bridge.runtime.model import provider_of

__all__ = ["open_tensors"]


def open_tensors(path: Path) -> FolderSource | MegatronSource:
    """The tensors of a Hugging Face folder, or of a Megatron checkpoint (which imports Megatron-Bridge).

    Raises:
        CheckpointError, UnsupportedConfig, UnmappedTensors: see `open_source` and `MegatronSource`.
    """
    if (path / "config.json").is_file():
        return FolderSource(open_source(path))

    _, config = provider_of(path)
    return MegatronSource(path, config)
