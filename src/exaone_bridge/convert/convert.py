"""Conversions on disk: Hugging Face folder -> Megatron checkpoint, and back, a tensor at a time; no model is built.

A Megatron checkpoint that we write also holds a folder `hf` with the source's configuration, tokenizer files and shard
layout, so that it can be exported where the source is out of reach.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from exaone_bridge.checkpoint.dtypes import byte_view
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import (
    INDEX,
    TensorInfo,
    TensorSpec,
    read_file_header,
    read_json,
)
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.hf.shards import (
    MAX_SHARD_BYTES,
    ShardWriter,
    assign_files,
    shard_layout,
    write_index,
)
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.megatron.tensors import MegatronSource
from exaone_bridge.checkpoint.megatron.torch_dist_write import (
    Parameter,
    WrittenParam,
    parameters_of,
    write_metadata,
    write_parameters,
)
from exaone_bridge.checkpoint.reshard.plan import check_layout, reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.checkpoint.staging import (
    check_new_output,
    check_space,
    full_disk_as_output_error,
    resumable,
    staged,
)
from exaone_bridge.convert.extra_tensors import PASSTHROUGH, keep_passthrough, passthrough_sizes
from exaone_bridge.convert.progress import Summary, deal, peak_memory, resident_memory
from exaone_bridge.errors import CheckpointError
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.hf_files import copy_companion_files
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["Summary", "export_checkpoint", "import_checkpoint"]

ASSETS = "hf"  # the folder in a Megatron checkpoint that holds what Megatron has no place for


def _import_rank(
    source: HFCheckpoint,
    target: Path,
    parameters: list[Parameter],
    shares: list[list[int]],
    progress: Progress,
) -> tuple[list[WrittenParam], int, int]:
    """Write this rank's share; where each parameter went, and the memory before and at most."""
    base, written = resident_memory(), []
    with full_disk_as_output_error(target):
        path = target / f"__{dist.get_rank()}_0.distcp"
        for where, nbytes in write_parameters(parameters, shares[dist.get_rank()], source, path):
            written.append(where)
            progress.advance(nbytes)
    return written, base, peak_memory()


def import_checkpoint(
    hf_folder: Path,
    megatron_folder: Path,
    layout: Layout,
    *,
    backend: str = "auto",
    workers: int = 1,
    dry_run: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Summary:
    """Convert a Hugging Face folder to a Megatron checkpoint (torch_dist), which loads at any layout.

    Args:
        layout: what the checkpoint's run config says; the weights are the same for all.
        backend: the same.
        workers: processes that write; each holds a parameter in memory.
        dry_run: check everything, and write nothing.

    Raises:
        CheckpointError, UnsupportedConfig, UnmappedTensors: see `HFCheckpoint.open`; or the target exists.
        UnsupportedLayout: the model cannot be cut so.
        OutputError: the disk is full.
    """
    started = time.perf_counter()
    check_new_output(megatron_folder)
    source = HFCheckpoint.open(hf_folder)
    check_layout(source.model_config, layout)
    ours = source.model_tensors
    plan = reshard_plan(source.model, Layout())
    validate_plan(plan, source.shapes)
    check_space(megatron_folder, source.nbytes)
    if dry_run:
        return Summary(len(source.tensors), source.nbytes, 0.0)
    from exaone_bridge.bridge.registration import supported
    from exaone_bridge.convert.run_config import layers_are_stacked, provider_for, write_beside
    from exaone_bridge.runtime.fork import ForkLauncher

    supported()
    provider = provider_for(hf_folder, layout, backend)
    parameters = parameters_of(
        plan, source.model_config.num_layers, stacked=layers_are_stacked(provider)
    )
    shares = deal([parameter.nbytes for parameter in parameters], workers)
    progress.stage("writing the Megatron checkpoint")
    progress.total(sum(tensor.nbytes for tensor in ours.values()))
    with staged(megatron_folder) as folder:
        iteration = write_beside(folder, provider, megatron_folder.absolute())
        arguments = (source, iteration, parameters, shares)
        results = ForkLauncher(workers).all(_import_rank, *arguments, progress=progress)
        write_metadata(
            iteration, parameters, ours, [where for written, _, _ in results for where in written]
        )
        assets = folder / ASSETS
        assets.mkdir()
        write_config_json(assets, source.config)
        copy_companion_files(hf_folder, assets)
        keep_passthrough(source, assets)
        (assets / INDEX).write_text(json.dumps({"weight_map": source.files}))
    base, peak = max(
        ((base, peak) for _, base, peak in results), key=lambda pair: pair[1] - pair[0]
    )
    seconds = time.perf_counter() - started
    return Summary(len(source.tensors), source.nbytes, seconds, peak_bytes=peak, base_bytes=base)


def _export_rank(
    source: MegatronSource,
    target: Path,
    writer: ShardWriter,
    shares: list[list[str]],
    passthrough: Mapping[str, TensorInfo],
    progress: Progress,
) -> tuple[int, int, int]:
    """Write this rank's share; bytes that were there already, and the memory before and at most."""
    base, reader = resident_memory(), TensorReader()
    try:
        with full_disk_as_output_error(target):
            for name in shares[dist.get_rank()]:
                if name in passthrough:
                    tensor = reader.read(passthrough[name])
                else:
                    tensor = source.read(name)
                writer.put(name, [byte_view(tensor)])
                progress.advance(tensor.nbytes)
                del tensor
            writer.close()
    finally:
        writer.close(flush=False)
    return writer.kept_bytes, base, peak_memory()


def export_checkpoint(
    megatron_folder: Path,
    hf_folder: Path,
    *,
    max_shard_bytes: int | None = None,
    drop_passthrough: bool = False,
    workers: int = 1,
    dry_run: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Summary:
    """Convert a Megatron checkpoint to a Hugging Face folder: weights, configuration, and what travelled with it.

    What an interrupted export has left is gone on with: tensors that are there already are compared, and stay.

    Args:
        max_shard_bytes: of a file; None: the files of the source, where the checkpoint remembers them, else 5 GB.
        drop_carried: leave out the tensors that travel beside the model, and say so in the configuration.
        workers: processes that write; each holds a parameter and a tensor in memory.
        dry_run: check everything, and write nothing.

    Raises:
        CheckpointError: no checkpoint there, the target exists, or what travels beside the model is out of reach.
        UnsupportedConfig: a model that none of our bridges made.
        OutputError: the disk is full.
    """
    started = time.perf_counter()
    check_new_output(hf_folder)
    if not megatron_folder.is_dir():
        raise CheckpointError(
            megatron_folder,
            "this folder does not exist",
            remedy="name a Megatron checkpoint folder",
        )

    from exaone_bridge.runtime.fork import ForkLauncher
    from exaone_bridge.runtime.model import read_provider

    _, config = read_provider(megatron_folder)
    source = MegatronSource(megatron_folder, config)
    assets, family = megatron_folder / ASSETS, source.family
    passthrough: dict[str, TensorInfo] = {}
    if drop_passthrough:
        config = family.write_hf_config(family.without_passthrough(source.model_config), config)
    elif passthrough_sizes(assets, family, source.model_config):
        beside = read_file_header(assets / PASSTHROUGH)[0]
        passthrough = {
            name: info for name, info in beside.items() if name not in source.tensors
        }  # built since the import
    specs: list[TensorSpec | TensorInfo] = [*source.tensors.values(), *passthrough.values()]
    sizes = {spec.name: spec.nbytes for spec in specs}
    files = _source_shards(assets / INDEX, sizes) if max_shard_bytes is None else None
    layout = shard_layout(specs, files or assign_files(sizes, max_shard_bytes or MAX_SHARD_BYTES))
    check_space(hf_folder, layout.nbytes)
    if dry_run:
        return Summary(len(specs), layout.nbytes, 0.0)
    progress.stage("writing the Hugging Face folder")
    progress.total(layout.nbytes)
    with resumable(hf_folder) as folder, full_disk_as_output_error(hf_folder):
        writer = ShardWriter.create(folder, layout)
        groups = [*source.groups(), *([name] for name in passthrough)]
        hands = deal([sum(sizes[name] for name in group) for group in groups], workers)
        shares = [[name for number in hand for name in groups[number]] for hand in hands]
        results = ForkLauncher(workers).all(
            _export_rank, source, folder, writer, shares, passthrough, progress=progress
        )
        write_index(folder, layout)
        write_config_json(folder, config)
        if assets.is_dir():
            copy_companion_files(assets, folder)
    base, peak = max(
        ((base, peak) for _, base, peak in results), key=lambda pair: pair[1] - pair[0]
    )
    seconds, kept = time.perf_counter() - started, sum(kept for kept, _, _ in results)
    return Summary(
        len(specs), layout.nbytes, seconds, peak_bytes=peak, base_bytes=base, kept_bytes=kept
    )


def _source_shards(index: Path, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """The source's shard layout, where the checkpoint remembers one and it is for these tensors."""
    if not index.is_file():
        return None
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(_is_plain(file) for file in files.values()):
        raise CheckpointError(
            index,
            "its weight_map has other values than plain file names",
            remedy="remove this file",
        )
    return files if files.keys() == sizes.keys() else None


def _is_plain(file: object) -> bool:
    """A name in the output folder and nowhere else."""
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
