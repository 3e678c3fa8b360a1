"""Converts a Megatron checkpoint to a Hugging Face folder, tensor by tensor, without a model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.hf.shards import (
    MAX_SHARD_BYTES,
    ShardWriter,
    assign_files,
    shard_layout,
    write_index,
)
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.staging import (
    check_new_output,
    check_space,
    full_disk_as_output_error,
    resumable,
)
from exaone_bridge.convert.export_source import (
    ExportSource,
    open_hf,
    open_megatron,
    with_adapter,
)
from exaone_bridge.convert.peft_adapter import write_peft_adapter
from exaone_bridge.convert.progress import Summary, balanced, largest_growth, memory_used
from exaone_bridge.errors import CheckpointError
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.runtime.progress_bar import shown_progress
from exaone_bridge.schema.hf_files import companion_files, copy_companion_files, has_tokenizer

__all__ = ["export_checkpoint"]


def export_checkpoint(
    megatron_folder: str | Path,
    hf_folder: str | Path,
    *,
    iteration: int | None = None,
    hf_source: str | Path | None = None,
    adapter: str | Path | None = None,
    peft: bool = False,
    max_shard_bytes: int | None = None,
    drop_passthrough: bool = False,
    workers: int = 1,
    dry_run: bool = False,
    progress: Progress | bool | None = None,
) -> Summary:
    """Convert a Megatron checkpoint to a Hugging Face folder with weights, config and tokenizer.

    What is given is checked before torch is imported.
    An interrupted export is continued: what it has written is compared, and kept where it is right.

    Args:
        megatron_folder: The source; with an adapter, a Hugging Face folder may be the source too.
        hf_folder: The output, which must not exist, or be an empty folder.
        iteration: The one to export; None: the one that the checkpoint's tracker file names.
        hf_source: A Hugging Face folder to take the tokenizer and all other files from; None: what
            the checkpoint has of its source.
        adapter: An adapter checkpoint of Megatron-Bridge's PEFT training, which is merged.
        peft: Write the adapter alone, in PEFT's format.
        max_shard_bytes: Of a file; None: the files of the Hugging Face source that the checkpoint
            was imported from, or 5 GB.
        drop_passthrough: Leave out passthrough tensors, and change config.json accordingly.
        workers: Processes that write; each has one parameter and one tensor in memory.
        dry_run: Check everything, and write nothing.
        progress: Whether to show the stages and the bytes, or an object that is told of them; None:
            on a terminal and in a notebook.

    Raises:
        CheckpointError: The source is damaged or lacks passthrough tensors, or the output exists.
        UnsupportedConfig: The model is not one of exaone_bridge's, or an adapter is not supported.
        UnmappedTensors: The adapter has tensors for which the model has no linear.
        OutputError: The disk is full.
    """
    started = time.perf_counter()
    megatron_folder, hf_folder = Path(megatron_folder), Path(hf_folder)
    check_new_output(hf_folder)
    if adapter is None or not (megatron_folder / "config.json").is_file():
        source = open_megatron(
            megatron_folder, iteration, hf_source, passthrough=not (drop_passthrough or peft)
        )
    else:
        source = open_hf(megatron_folder, hf_source)
    if adapter is not None:
        from exaone_bridge.checkpoint.megatron.adapter import AdapterCheckpoint

        adapters = AdapterCheckpoint(Path(adapter), source.model)
        source = with_adapter(source, adapters)
        if peft:
            base = memory_used()
            written = write_peft_adapter(
                adapters, source.model, megatron_folder, hf_folder, dry_run=dry_run
            )
            seconds = 0.0 if dry_run else time.perf_counter() - started
            peak = memory_used(peak=True)
            return Summary(*written, seconds, peak, base, notes=source.notes)
    if drop_passthrough:
        source = source.without_passthrough()
    notes = source.notes + _notes_on_files(source.files_from)
    specs = [*source.tensors.values(), *source.passthrough.values()]
    sizes = {spec.name: spec.nbytes for spec in specs}
    files = _source_files(source.index, sizes) if max_shard_bytes is None else None
    layout = shard_layout(specs, files or assign_files(sizes, max_shard_bytes or MAX_SHARD_BYTES))
    check_space(hf_folder, layout.nbytes)
    if dry_run:
        return Summary(len(specs), layout.nbytes, 0.0, notes=notes)
    from exaone_bridge.runtime.fork import ForkLauncher

    groups = [*source.groups, *([name] for name in source.passthrough)]
    bins = balanced([sum(sizes[name] for name in group) for group in groups], workers)
    shares = [[name for index in indices for name in groups[index]] for indices in bins]
    with shown_progress("export", progress, nbytes=True) as shown, resumable(hf_folder) as folder:
        shown.stage("writing the Hugging Face folder")
        shown.total(layout.nbytes)
        writer = ShardWriter.create(folder, layout)
        results = ForkLauncher(workers, megatron=False).all(
            _export_rank, source, hf_folder, writer, shares, progress=shown
        )
        write_index(folder, layout)
        write_config_json(folder, source.config)
        if source.files_from is not None:
            copy_companion_files(source.files_from, folder)
    base, peak = largest_growth([(base, peak) for _, base, peak in results])
    return Summary(
        len(specs),
        layout.nbytes,
        time.perf_counter() - started,
        peak_bytes=peak,
        base_bytes=base,
        kept_bytes=sum(kept for kept, _, _ in results),
        notes=notes,
    )


def _notes_on_files(folder: Path | None) -> tuple[str, ...]:
    """Say what is copied from where, and that there is no tokenizer if there is none."""
    notes: tuple[str, ...] = ()
    if folder is not None and (names := sorted(companion_files(folder))):
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        notes = (f"{folder}: {len(names)} files are copied as they are ({some})",)
    if folder is None or not has_tokenizer(folder):
        notes += (
            "warning: the checkpoint has no tokenizer, and so the output has none; "
            "--hf-source names a Hugging Face folder to take it from",
        )
    return notes


def _export_rank(
    source: ExportSource,
    target: Path,
    writer: ShardWriter,
    shares: list[list[str]],
    progress: Progress,
) -> tuple[int, int, int]:
    """Write this rank's tensors.

    Returns:
        The bytes that an earlier run has written, and the bytes of memory before and at most.
    """
    import torch.distributed as dist

    from exaone_bridge.checkpoint.dtypes import byte_view

    base = memory_used()
    with full_disk_as_output_error(target), writer:
        for name in shares[dist.get_rank()]:
            tensor = source.read(name)
            writer.put(name, [byte_view(tensor)])
            progress.advance(tensor.nbytes)
            del tensor
    return writer.kept_bytes, base, memory_used(peak=True)


def _source_files(index: Path, sizes: Mapping[str, int]) -> dict[str, str] | None:
    """Return the source's files, tensor -> file, if the checkpoint has them for these tensors."""
    if not index.is_file():
        return None
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(_is_file_name(file) for file in files.values()):
        raise CheckpointError(
            index,
            "its weight_map has other values than plain file names",
            remedy="remove this file",
        )
    return files if files.keys() == sizes.keys() else None


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")
