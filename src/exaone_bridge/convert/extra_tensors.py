"""Tensors that a checkpoint ships beside its model: no part of the model, and never lost.

A Megatron checkpoint that we write keeps them in its folder `hf`, bit for bit, so that it can be exported where the
source is out of reach.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.dtypes import byte_view
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_file_header
from exaone_bridge.checkpoint.hf.shards import ShardWriter, shard_layout
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.model_family import ModelFamily

__all__ = ["PASSTHROUGH", "keep_passthrough", "passthrough_sizes"]

PASSTHROUGH = "carried.safetensors"

logger = logging.getLogger(__name__)


def keep_passthrough(source: HFCheckpoint, folder: Path) -> None:
    """Copy a source's carried tensors to `folder`; nothing happens where source and configuration have none."""
    if not source.passthrough and not source.family.passthrough_tensors(source.model_config):
        return
    layout = shard_layout(source.passthrough.values(), PASSTHROUGH)
    with ShardWriter.create(folder, layout) as writer:
        for name in source.passthrough:
            writer.put(name, [byte_view(source.read(name))])
    logger.info(
        "carried past the model unchanged: %d tensors, in %s",
        len(source.passthrough),
        folder / PASSTHROUGH,
    )


def passthrough_sizes(folder: Path, family: ModelFamily, model_config: Any) -> dict[str, int]:
    """Name -> bytes of what `keep_passthrough` left in `folder`.

    Raises:
        CheckpointError: the configuration says there is something, and it is not there.
    """
    path = folder / PASSTHROUGH
    if path.is_file():
        return {name: tensor.nbytes for name, tensor in read_file_header(path)[0].items()}
    if names := [tensor.name for tensor in family.passthrough_tensors(model_config)]:
        raise CheckpointError(
            path,
            f"this file is missing, and with it {names[0]} and others that travel beside the model",
            remedy="restore it from the Hugging Face source by another `import`, or leave them out with --drop-passthrough",
        )
    return {}
