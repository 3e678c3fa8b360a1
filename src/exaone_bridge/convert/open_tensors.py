"""A model's tensors by their Hugging Face names, of a Hugging Face folder or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.megatron.tensors import MegatronSource
from exaone_bridge.runtime.model import read_provider

__all__ = ["open_tensors"]


def open_tensors(path: Path) -> HFCheckpoint | MegatronSource:
    """The tensors of a Hugging Face folder, or of a Megatron checkpoint (which imports Megatron-Bridge).

    Raises:
        CheckpointError, UnsupportedConfig, UnmappedTensors: see `HFCheckpoint.open` and `MegatronSource`.
    """
    if (path / "config.json").is_file():
        return HFCheckpoint.open(path)

    _, config = read_provider(path)
    return MegatronSource(path, config)
