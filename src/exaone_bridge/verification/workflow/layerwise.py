"""Verifies a model that does not fit into memory twice: a layer at a time, on both sides.

Both sides run their own whole model; only its weights come and go. Transformers' and Megatron-Core's layers are filled
just before they run and emptied after, so that masks, RoPE, schedule and residuals are those of the real thing.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.runtime.launch import Launcher, choose_launcher
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.hf_files import copy_companion_files
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.digests import Digest, digest_folder
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
)
from exaone_bridge.verification.report.report import Check, Report
from exaone_bridge.verification.workflow.job import (
    DTYPES,
    MegatronResult,
    ReferenceResult,
    VerifyOptions,
    Workload,
    make_workload,
)
from exaone_bridge.verification.workflow.megatron_layerwise import LayerwiseMegatron
from exaone_bridge.verification.workflow.transformers_layerwise import layerwise_transformers
from exaone_bridge.verification.workflow.verify import arithmetic, make_report

__all__ = ["is_layerwise", "verify_layerwise"]

_HOLDABLE = 2**31  # bytes of weights in fp32 that are held whole


def is_layerwise(folder: Path, wish: bool | None) -> bool:
    """Whether to go layer by layer: as wished, or by size."""
    return wish if wish is not None else HFCheckpoint.open(folder).num_elements * 4 > _HOLDABLE


def run_transformers_layerwise(folder: Path, job: Workload, progress: Progress) -> ReferenceResult:
    """On one rank: as `run_transformers`, a layer at a time."""
    from exaone_bridge.verification.workflow.transformers import capture_transformers

    source = HFCheckpoint.open(folder)
    progress.stage("Transformers' logits, layer by layer")
    model = layerwise_transformers(source, torch.float32)
    found = ReferenceResult(
        [capture_transformers(model, job.points, *batch) for batch in job.runs()]
    )
    if job.dtype != "float32":
        del model
        model = layerwise_transformers(source, DTYPES[job.dtype])
        found.half = [
            capture_transformers(model, job.points, *batch, perturbed=False) for batch in job.runs()
        ]
    return found


def run_megatron_layerwise(
    folder: Path, target: Path, job: Workload, progress: Progress
) -> tuple[MegatronResult, dict[str, Digest]]:
    """On a rank: as `run_megatron`, a layer at a time; weights are digested instead of written to `target`."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.exact_bridge import config_mapping
    from exaone_bridge.verification.workflow.megatron import capture_megatron

    source = HFCheckpoint.open(folder)
    bridge = AutoBridge.from_hf_pretrained(folder)
    progress.stage("HF -> Megatron-Core -> HF, layer by layer")
    streamed = LayerwiseMegatron(
        bridge, source, job.layout, job.backend, DTYPES[source.model_config.dtype], job.overrides
    )
    digests = streamed.round_trip()
    if torch.distributed.get_rank() == 0:
        write_config_json(
            target, bridge._model_bridge.megatron_to_hf_config(streamed.model[0].config)
        )
        copy_companion_files(folder, target)
    del streamed
    gc.collect()
    progress.stage("Megatron-Core's logits, layer by layer")
    streamed = LayerwiseMegatron(
        bridge, source, job.layout, job.backend, DTYPES[job.dtype], job.overrides
    )
    streamed.stream_layers()
    runs = [capture_megatron(streamed.model, job.points, *batch) for batch in job.runs()]
    return MegatronResult(config_mapping(bridge.hf_pretrained.config), runs), digests


def verify_layerwise(
    source_folder: Path,
    layout: Layout,
    asked: VerifyOptions = VerifyOptions(),
    launcher: Launcher | None = None,
    *,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """`verify`, holding one layer's weights at a time on either side.

    Generation and gradients need the whole model, and are not run; there is one prompt of each length.
    """
    from exaone_bridge.verification.workflow.megatron import merge

    started = time.perf_counter()
    launcher = launcher or choose_launcher(layout.ranks)
    source_folder = source_folder.resolve()
    source = HFCheckpoint.open(source_folder)
    job = make_workload(
        source, layout, dataclasses.replace(asked, count=1, generation=False, gradients=False)
    )
    theirs = launcher.first(run_transformers_layerwise, source_folder, job, progress=progress)
    before = digest_folder(source_folder)
    with launcher.folder() as work:
        results = launcher.all(run_megatron_layerwise, source_folder, work, job, progress=progress)
        # What travels beside the model is copied, not converted.
        after = {name: before[name] for name in source.passthrough} | results[0][1]
        checks = [
            compare_digests(before, after),
            compare_configs(results[0][0].config, read_json(work / "config.json")),
            compare_files(source_folder, work),
        ]
    ours = [
        merge([result.runs[number] for result, _ in results]) for number in range(len(job.batches))
    ]
    found = arithmetic(theirs, ours, None, source, job)
    why = "it needs the whole model in memory (--no-stream)"
    unmet = {"generation": asked.generation, "gradients": asked.gradients}
    found = dataclasses.replace(
        found,
        checks=(
            *found.checks,
            *[Check.not_run(name, why) for name, wanted in unmet.items() if wanted],
        ),
    )
    seconds = time.perf_counter() - started
    return make_report(
        source, job, before, checks, found, seed=asked.seed, seconds=seconds, streaming=True
    )
