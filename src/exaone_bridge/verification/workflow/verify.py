"""Verifies one model: its round trip through Megatron-Core, and its logits there against Transformers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.runtime.launch import Launcher, choose_launcher
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.locate import locate
from exaone_bridge.verification.checks.digests import Digest, digest_folder
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
)
from exaone_bridge.verification.checks.generation import compare_generation
from exaone_bridge.verification.checks.gradients import compare_gradients
from exaone_bridge.verification.checks.logits import (
    compare_activations,
    compare_half_precision,
    compare_logits,
)
from exaone_bridge.verification.report.report import (
    ActivationDiff,
    Check,
    Divergence,
    Report,
    versions,
)
from exaone_bridge.verification.report.summary import model_summary
from exaone_bridge.verification.workflow.job import (
    ReferenceResult,
    VerifyOptions,
    Workload,
    make_workload,
    run_generation,
    run_megatron,
    run_transformers,
)

__all__ = ["ArithmeticResult", "arithmetic", "make_report", "verify"]


@dataclass(frozen=True, slots=True)
class ArithmeticResult:
    """The comparison of logits, activations and gradients."""

    checks: tuple[Check, ...]
    activations: tuple[ActivationDiff, ...] = ()
    divergence: Divergence | None = None


def arithmetic(
    theirs: ReferenceResult,
    ours: Sequence[Activations],
    gradients: Any,
    source: HFCheckpoint,
    job: Workload,
) -> ArithmeticResult:
    """Compare the logits, activations and gradients of both sides."""
    half = job.dtype != "float32"
    places = compare_activations(job.points, theirs.runs, ours, source.model_config, theirs.half)
    if half:
        assert theirs.half is not None
        check = compare_half_precision(theirs.runs, theirs.half, ours, job.dtype)
    else:
        check = compare_logits(theirs.runs, ours, places)
    location = locate(places) if not check.passed or not half else None
    if location is not None:  # also where a place parts and the logits do not show it
        check = dataclasses.replace(check, passed=False, details=str(location))
    checks = [check]
    if job.gradient_tokens is not None:
        positions = job.gradient_tokens.shape[0] * (job.gradient_tokens.shape[1] - 1)
        checks.append(
            compare_gradients(theirs.gradients, gradients, source.model_config, positions)
        )
    return ArithmeticResult(tuple(checks), places, location)


def make_report(
    source: HFCheckpoint,
    job: Workload,
    tensors: Mapping[str, Digest],
    checks: Sequence[Check],
    found: ArithmeticResult,
    *,
    seed: int,
    seconds: float,
    other: str | None = None,
    **setup: Any,
) -> Report:
    """The report of what was found of a job.

    Args:
        source: the model; its folder's name is the report's.
        tensors: the digests of its tensors.
        checks: of what lies on disk, and of generation.
        found: what `arithmetic` gave.
        other: what it was held against, if not its own round trip.
        setup: settings beside the job's own.
    """
    return Report(
        source=source.folder.name,
        other=other,
        layout=str(job.layout),
        checks=(*checks, *found.checks),
        backend=job.backend,
        dtype=job.dtype,
        model=model_summary(source),
        activations=found.activations,
        divergence=found.divergence,
        tensors={name: digest.as_json() for name, digest in tensors.items()},
        setup=job.setup(seed) | setup,
        versions=versions(),
        seconds=seconds,
    )


def verify(
    source_folder: Path,
    layout: Layout,
    asked: VerifyOptions = VerifyOptions(),
    launcher: Launcher | None = None,
    *,
    megatron: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Check that a model survives Megatron-Core: what lies on disk after a round trip, and what it computes there.

    Args:
        source_folder: a Hugging Face folder.
        layout: of Megatron-Core's side.
        asked: prompts, precision, and which checks.
        megatron: a Megatron checkpoint of the same model, whose weights are to be looked at.
        launcher: has the ranks of this layout; None: torchrun's or forked ones.
        progress: is told of each stage.

    Raises:
        BridgeError: bad input; see `HFCheckpoint.open`.
    """
    started = time.perf_counter()
    launcher = launcher or choose_launcher(layout.ranks)
    source_folder = source_folder.resolve()
    source = HFCheckpoint.open(source_folder)
    job = make_workload(source, layout, asked)
    theirs = launcher.first(run_transformers, source_folder, job, progress=progress)
    before = digest_folder(source_folder)
    with launcher.folder() as work:
        target = work / source_folder.name
        target.mkdir(exist_ok=True)
        arguments = (source_folder, megatron, target, source.files, job)
        results = launcher.all(run_megatron, *arguments, progress=progress)
        checks = [
            compare_digests(before, digest_folder(target)),
            compare_configs(results[0].config, read_json(target / "config.json")),
            compare_files(source_folder, target),
        ]
        if job.generate:
            progress.stage("generation after the round trip")
            after = launcher.first(run_generation, target, job)
            checks.append(compare_generation(theirs.generated or {}, after))
    from exaone_bridge.verification.workflow.megatron import merge

    ours = [
        merge([result.runs[number] for result in results]) for number in range(len(job.batches))
    ]
    found = arithmetic(theirs, ours, results[0].gradients, source, job)
    return make_report(
        source, job, before, checks, found, seed=asked.seed, seconds=time.perf_counter() - started
    )
