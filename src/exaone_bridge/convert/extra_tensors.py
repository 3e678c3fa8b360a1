"""Passthrough tensors of an import, which go from source to export untouched.

A Megatron checkpoint has them in its folder `hf`, so that it can be exported without the source.
"""

from __future__ import annotations

import logging
from pathlib import Path

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import TensorInfo, read_file_header
from exaone_bridge.checkpoint.hf.shards import ShardWriter, shard_layout
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.model_family import ModelDescription

__all__ = ["ASSETS", "PASSTHROUGH_FILE", "read_passthrough", "write_passthrough"]

ASSETS = "hf"  # the folder in a Megatron checkpoint for what Megatron does not store
PASSTHROUGH_FILE = "carried.safetensors"  # the name that checkpoints of the first release have

logger = logging.getLogger(__name__)


def write_passthrough(source: HFCheckpoint, folder: Path) -> None:
    """Copy the passthrough tensors of a source to a folder, if it or its config has any."""
    if not source.passthrough and not source.model.passthrough_tensors:
        return
    from exaone_bridge.checkpoint.dtypes import byte_view

    layout = shard_layout(source.passthrough.values(), PASSTHROUGH_FILE)
    with ShardWriter.create(folder, layout) as writer:
        for name in source.passthrough:
            writer.put(name, [byte_view(source.read(name))])
    logger.info(
        "passthrough tensors copied: %d, to %s", len(source.passthrough), folder / PASSTHROUGH_FILE
    )


def read_passthrough(folder: Path, model: ModelDescription) -> dict[str, TensorInfo]:
    """Find the tensors that `write_passthrough` wrote to a folder.

    Raises:
        CheckpointError: The config says that there are some, and the file is missing.
    """
    path = folder / PASSTHROUGH_FILE
    if path.is_file():
        return read_file_header(path)[0]
    if model.passthrough_tensors:
        raise CheckpointError(
            path,
            f"this file with the passthrough tensors ({model.passthrough_tensors[0].name}, ...) "
            "is missing",
            remedy="restore it from the Hugging Face source by another `import`, "
            "or leave them out with --drop-passthrough",
        )
    return {}
