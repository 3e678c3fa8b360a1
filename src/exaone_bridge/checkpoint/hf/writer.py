"""Writes `config.json`, and small models with it. No torch until a tensor is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.shards import ShardWriter, assign_files, shard_layout, write_index
from exaone_bridge.schema.json_types import JSONMapping

if TYPE_CHECKING:
    import torch

__all__ = ["write_config_json", "write_model"]


def write_model(
    folder: Path,
    config: JSONMapping,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write a model from one process: the weights, their index, and `config.json`.

    Args:
        folder: An existing folder.
        config: `config.json`.
        specs: All tensors, in the order in which they are assigned to files.
        tensors: Names and values [...], of the shapes in `specs`, in any order.
    """
    from exaone_bridge.checkpoint.dtypes import byte_view  # which imports torch

    layout = shard_layout(specs, assign_files({spec.name: spec.nbytes for spec in specs}))
    with ShardWriter.create(folder, layout) as writer:
        for name, tensor in tensors:
            writer.put(name, [byte_view(tensor)])
    write_index(folder, layout)
    write_config_json(folder, config)


def write_config_json(folder: Path, config: JSONMapping) -> None:
    """Write `config.json` with sorted keys, as `save_pretrained` does.

    The version of Transformers stays that of the config, whose spelling it names; a config without
    one gets the installed version.
    """
    written = {"transformers_version": version("transformers"), **config}
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
