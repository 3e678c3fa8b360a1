"""Writes Hugging Face folders: safetensors shards, their index, the configuration, and what travels with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from exaone_bridge.checkpoint.hf.headers import INDEX
from exaone_bridge.checkpoint.staging import as_usual

__all__ = [
    "MAX_SHARD_BYTES",
    "plan_shards",
    "write_config_json",
    "write_weights",
]

MAX_SHARD_BYTES = 5 * 10**9  # as Transformers' save_pretrained


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int = MAX_SHARD_BYTES) -> dict[str, str]:
    """Tensor -> file: in the order given, a new shard where the next tensor would not fit.

    Args:
        sizes: bytes of each tensor.
        max_shard_bytes: of a shard; a larger tensor has a shard of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {
        name: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number, names in enumerate(shards, start=1)
        for name in names
    }


def write_weights(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], files: Mapping[str, str]
) -> None:
    """Write tensors to the shards that `files` names; each shard as soon as its last tensor has come.

    Args:
        folder: must exist.
        weights: every tensor of `files`, in any order.
        files: tensor -> file name; the index is written where there are several, or another name than the usual.
    """
    wanted = {
        file: {name for name, of in files.items() if of == file} for file in set(files.values())
    }
    held: dict[str, dict[str, torch.Tensor]] = {file: {} for file in wanted}
    total = 0
    for name, tensor in weights:
        file = files[name]
        held[file][name] = tensor.detach().cpu().contiguous()
        total += tensor.nbytes
        if held[file].keys() == wanted[file]:
            save_file(held.pop(file), folder / file, metadata={"format": "pt"})
            as_usual(folder / file)
    if held:
        raise RuntimeError(
            f"{folder}: the stream of weights ended before {sorted(held)} was complete."
        )
    if set(wanted) != {"model.safetensors"}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_config_json(folder: Path, config: Mapping[str, Any]) -> None:
    """`config.json` as `save_pretrained` writes it: sorted keys, two spaces, and Transformers' version."""
    text = json.dumps(
        {**config, "transformers_version": version("transformers")}, indent=2, sort_keys=True
    )
    (folder / "config.json").write_text(text + "\n")
