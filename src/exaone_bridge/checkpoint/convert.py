"""Conversions on disk: Hugging Face folder -> Megatron checkpoint, and back, at any layout.

A Megatron checkpoint that we write also holds a folder `hf` with the source's configuration, tokenizer files and shard
layout, so that it can be exported where the source is out of reach.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from exaone_bridge.checkpoint.carried import carried_sizes, carried_weights, keep_carried
from exaone_bridge.checkpoint.headers import INDEX, read_json
from exaone_bridge.checkpoint.source import HFSource, check_layout, open_source
from exaone_bridge.checkpoint.staging import refuse_existing, staged
from exaone_bridge.checkpoint.writer import MAX_SHARD_BYTES, plan_shards, write_config, write_hf_folder
from exaone_bridge.errors import CheckpointError
from exaone_bridge.families import family_of
from exaone_bridge.parts.files import copy_travelling_files
from exaone_bridge.parts.layout import Layout
from exaone_bridge.parts.rows import hf_nbytes

__all__ = ["Summary", "drain", "export_checkpoint", "import_checkpoint", "shards_like"]

ASSETS = "hf"  # the folder in a Megatron checkpoint that holds what Megatron has no place for


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion moved: tensors and bytes of the Hugging Face side, and seconds from start to rename."""

    tensors: int
    nbytes: int
    seconds: float


def shards_like(source: HFSource) -> dict[str, str]:
    """Tensor -> file, as the source has it."""
    return {name: tensor.file.name for name, tensor in source.tensors.items()}


def drain(weights: Iterable[Any], write: Callable[[Iterable[Any]], None]) -> None:
    """Rank 0 writes the stream; every other rank takes part in the gathering that yields it."""
    if dist.get_rank() == 0:
        write(weights)
    else:
        for _ in weights:
            pass


def _import_rank(source: Path, target: Path, layout: Layout, backend: str) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.model import build
    from exaone_bridge.host.world import emit

    emit("loading weights")
    bridge = AutoBridge.from_hf_pretrained(source)
    model = build(bridge, layout, backend=backend)
    emit("writing the Megatron checkpoint")
    bridge.save_megatron_model(model, target)


def import_checkpoint(
    hf_folder: Path,
    megatron_folder: Path,
    layout: Layout,
    *,
    backend: str = "auto",
    on_event: Callable[[int, Any], None] | None = None,
) -> Summary:
    """Convert a Hugging Face folder to a Megatron checkpoint (torch_dist), which loads at any layout.

    Raises:
        CheckpointError, UnsupportedConfig, UnmappedTensors: see `open_source`; or the target exists.
        UnsupportedLayout: the model cannot be cut so.
    """
    from exaone_bridge.host.registration import supported
    from exaone_bridge.host.world import run_ranks

    started = time.perf_counter()
    refuse_existing(megatron_folder)
    source = open_source(hf_folder)
    check_layout(source.facts, layout)
    supported()
    with staged(megatron_folder) as folder:
        run_ranks(_import_rank, layout.ranks, hf_folder.absolute(), folder, layout, backend, on_event=on_event)
        assets = folder / ASSETS
        assets.mkdir()
        write_config(assets, source.config)
        copy_travelling_files(hf_folder, assets)
        keep_carried(source, assets)
        (assets / INDEX).write_text(json.dumps({"weight_map": shards_like(source)}))
    return Summary(len(source.tensors), source.nbytes, time.perf_counter() - started)


def _export_rank(
    source: Path,
    target: Path,
    layout: Layout,
    backend: str,
    config: Mapping[str, Any],
    model_config: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    from megatron.bridge import AutoBridge
    from transformers import CONFIG_MAPPING

    from exaone_bridge.host.model import load_megatron
    from exaone_bridge.host.world import emit

    emit("loading the Megatron checkpoint")
    bridge = AutoBridge.from_hf_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(model_config)))
    model = load_megatron(bridge, source, layout, backend=backend)
    emit("writing the Hugging Face folder")
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    beside = (weight for weight in carried_weights(source / ASSETS) if weight[0] in files)
    drain(
        weights,
        lambda stream: write_hf_folder(target, itertools.chain(stream, beside), files, config, source / ASSETS),
    )


def export_checkpoint(
    megatron_folder: Path,
    hf_folder: Path,
    layout: Layout,
    *,
    backend: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    drop_carried: bool = False,
    on_event: Callable[[int, Any], None] | None = None,
) -> Summary:
    """Convert a Megatron checkpoint to a Hugging Face folder: weights, configuration, and what travelled with it.

    Args:
        drop_carried: leave out the tensors that travel beside the model, and say so in the configuration.

    Raises:
        CheckpointError: no checkpoint there, the target exists, or what travels beside the model is out of reach.
        UnsupportedConfig: a model that none of our bridges made.
        UnsupportedLayout: the model cannot be cut so.
    """
    started = time.perf_counter()
    refuse_existing(hf_folder)
    if not megatron_folder.is_dir():
        raise CheckpointError(megatron_folder, "this folder does not exist", remedy="name a Megatron checkpoint folder")

    import torch

    from exaone_bridge.host.model import provider_of
    from exaone_bridge.host.world import run_ranks

    _, config = provider_of(megatron_folder)
    family = family_of(config["architectures"], where=str(megatron_folder))
    facts = family.read_config(config)
    check_layout(facts, layout)
    sizes = hf_nbytes(family.rows(facts), facts.dims, getattr(torch, facts.dtype).itemsize)
    model_config = family.write_config(family.without_carried(facts), config)
    if drop_carried:
        config = model_config
    else:
        sizes |= carried_sizes(megatron_folder / ASSETS, family, facts)
    files = _source_shards(megatron_folder / ASSETS / INDEX, sizes) or plan_shards(sizes, max_shard_bytes)
    with staged(hf_folder) as folder:
        arguments = (megatron_folder.absolute(), folder, layout, backend, config, model_config, files)
        run_ranks(_export_rank, layout.ranks, *arguments, on_event=on_event)
    return Summary(len(sizes), sum(sizes.values()), time.perf_counter() - started)


def _source_shards(index: Path, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """The source's shard layout, where the checkpoint remembers one and it is for these tensors."""
    if not index.is_file():
        return None
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(_is_plain(file) for file in files.values()):
        raise CheckpointError(index, "its weight_map has other values than plain file names", remedy="remove this file")
    return files if files.keys() == sizes.keys() else None


def _is_plain(file: object) -> bool:
    """A name in the output folder and nowhere else."""
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
