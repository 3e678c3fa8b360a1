"""Converts a Hugging Face folder to a Megatron checkpoint, by parameter, without a model.

The Megatron checkpoint also gets a folder `hf` with the source's config, tokenizer files,
passthrough tensors and file names, so that it can be exported without the source.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import INDEX
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.reshard.plan import check_layout, reshard_plan
from exaone_bridge.checkpoint.reshard.validate import validate_plan
from exaone_bridge.checkpoint.staging import (
    check_new_output,
    check_space,
    full_disk_as_output_error,
    staged,
)
from exaone_bridge.convert.extra_tensors import ASSETS, write_passthrough
from exaone_bridge.convert.progress import Summary, balanced, largest_growth, memory_used
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.runtime.progress_bar import shown_progress
from exaone_bridge.schema.hf_files import copy_companion_files, links_left_out
from exaone_bridge.schema.parallel_layout import Layout

if TYPE_CHECKING:
    from exaone_bridge.checkpoint.megatron.torch_dist_write import Parameter, WrittenParam

__all__ = ["import_checkpoint"]


def import_checkpoint(
    hf_folder: str | Path,
    megatron_folder: str | Path,
    layout: Layout | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    sp: bool = False,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
    backend: str = "auto",
    workers: int = 1,
    dry_run: bool = False,
    progress: Progress | bool | None = None,
) -> Summary:
    """Convert a Hugging Face folder to a Megatron checkpoint (torch_dist) that loads at any layout.

    Args:
        hf_folder: The source.
        megatron_folder: The output, which must not exist, or be an empty folder.
        layout: Written to run_config.yaml; the weights are the same for all layouts. None: the
            layout of the sizes.
        tp, pp, vpp, sp, ep, etp, cp: The sizes of `Layout`, in place of a layout.
        backend: Written to run_config.yaml too.
        workers: Processes that write; each has one parameter in memory.
        dry_run: Check everything, and write nothing.
        progress: Whether to show the stages and the bytes, or an object that is told of them; None:
            on a terminal and in a notebook.

    Raises:
        CheckpointError: The source is damaged, or the output exists.
        UnsupportedConfig: The config is not supported.
        UnmappedTensors: Keys are missing, or there are unexpected keys.
        UnsupportedLayout: The layout does not fit the model.
        OutputError: The disk is full.
    """
    started = time.perf_counter()
    layout = Layout.of(layout, Layout(tp=tp, pp=pp, vpp=vpp, sp=sp, ep=ep, etp=etp, cp=cp))
    hf_folder, megatron_folder = Path(hf_folder), Path(megatron_folder)
    check_new_output(megatron_folder)
    source = HFCheckpoint.open(hf_folder)
    check_layout(source.model_config, layout)
    plan = reshard_plan(source.model, Layout())
    validate_plan(plan, source.shapes)
    check_space(megatron_folder, source.nbytes)
    notes = tuple(f"{hf_folder}: {note}" for note in (*source.notes, *_note_on_links(hf_folder)))
    if dry_run:
        return Summary(len(source.tensors), source.nbytes, 0.0, notes=notes)
    from exaone_bridge.bridge.registration import supported
    from exaone_bridge.checkpoint.megatron.torch_dist_write import parameters_of, write_metadata
    from exaone_bridge.convert.run_config import layers_are_stacked, provider_for, write_beside
    from exaone_bridge.runtime.fork import ForkLauncher

    supported()
    provider = provider_for(hf_folder, layout, backend)
    parameters = parameters_of(
        plan, source.model_config.num_layers, stacked=layers_are_stacked(provider)
    )
    shares = balanced([parameter.nbytes for parameter in parameters], workers)
    with (
        shown_progress("import", progress, nbytes=True) as shown,
        staged(megatron_folder) as folder,
    ):
        shown.stage("writing the Megatron checkpoint")
        shown.total(sum(tensor.nbytes for tensor in source.model_tensors.values()))
        iteration = write_beside(folder, provider, megatron_folder.absolute())
        results = ForkLauncher(workers, megatron=False).all(
            _import_rank, source, megatron_folder, iteration, parameters, shares, progress=shown
        )
        written = [param for params, _, _ in results for param in params]
        write_metadata(iteration, parameters, source.tensors, written)
        assets = folder / ASSETS
        assets.mkdir()
        write_config_json(assets, source.config)
        copy_companion_files(hf_folder, assets)
        write_passthrough(source, assets)
        (assets / INDEX).write_text(json.dumps({"weight_map": source.files}))
    base, peak = largest_growth([(base, peak) for _, base, peak in results])
    seconds = time.perf_counter() - started
    return Summary(
        len(source.tensors),
        source.nbytes,
        seconds,
        peak_bytes=peak,
        base_bytes=base,
        notes=notes,
    )


def _note_on_links(hf_folder: Path) -> tuple[str, ...]:
    """Say which files are not copied because they are links to elsewhere."""
    if not (names := links_left_out(hf_folder)):
        return ()
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"warning: links that lead out of the folder are not copied ({some}); "
        "--follow-links copies what they lead to",
    )


def _import_rank(
    source: HFCheckpoint,
    target: Path,
    iteration: Path,
    parameters: list[Parameter],
    shares: list[list[int]],
    progress: Progress,
) -> tuple[list[WrittenParam], int, int]:
    """Write this rank's parameters to a file of its own.

    Returns:
        Where each parameter is, and the bytes of memory before and at most.
    """
    import torch.distributed as dist

    from exaone_bridge.checkpoint.megatron.torch_dist_write import write_parameters

    base, written = memory_used(), []
    with full_disk_as_output_error(target):
        path = iteration / f"__{dist.get_rank()}_0.distcp"
        for where, nbytes in write_parameters(parameters, shares[dist.get_rank()], source, path):
            written.append(where)
            progress.advance(nbytes)
    return written, base, memory_used(peak=True)
