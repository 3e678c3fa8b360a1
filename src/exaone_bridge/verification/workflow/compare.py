"""Verifies one model against another: each a Hugging Face folder or a Megatron checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.errors import BridgeError, CheckpointError
from exaone_bridge.runtime.launch import Launcher
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.digests import digest_folder
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
)
from exaone_bridge.verification.checks.generation import compare_generation
from exaone_bridge.verification.report.report import Check, Report
from exaone_bridge.verification.workflow.job import (
    ReferenceResult,
    VerifyOptions,
    Workload,
    make_workload,
    run_generation,
    run_megatron,
)
from exaone_bridge.verification.workflow.verify import (
    ArithmeticResult,
    arithmetic,
    make_report,
    verify,
)

__all__ = ["compare", "is_megatron", "verify_megatron"]


def is_megatron(path: Path) -> bool:
    """Whether this folder is a Megatron checkpoint, or an iteration of one."""
    return not (path / "config.json").is_file() and (
        (path / "run_config.yaml").is_file() or any(path.glob("iter_*/run_config.yaml"))
    )


@dataclass(frozen=True, slots=True)
class Side:
    """One model: its Hugging Face folder, and the Megatron checkpoint that this was exported from, if it was."""

    name: str
    folder: Path
    megatron: Path | None


@contextlib.contextmanager
def side(path: Path, launcher: Launcher, progress: Progress) -> Iterator[Side]:
    """The model at this path; a Megatron checkpoint is exported to a temporary folder.

    Raises:
        CheckpointError: neither one nor the other is there.
    """
    if not path.is_dir():
        raise CheckpointError(
            path,
            "this folder does not exist",
            remedy="name a Hugging Face folder or a Megatron checkpoint",
        )
    path = path.resolve()
    if not is_megatron(path):
        yield Side(path.name, path, None)
        return
    with launcher.folder() as work:
        folder = work / path.name
        _export(path, folder, launcher, progress)
        yield Side(path.name, folder, path)


def _export(path: Path, folder: Path, launcher: Launcher, progress: Progress) -> None:
    """By the conversion engine, tensor by tensor, without a model."""
    from exaone_bridge.convert.convert import export_checkpoint

    progress.stage("exporting the Megatron checkpoint")
    launcher.subprocess(export_checkpoint, path, folder, progress=progress)


def verify_megatron(
    path: Path,
    layout: Layout,
    asked: VerifyOptions,
    launcher: Launcher,
    *,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """`verify` of a Megatron checkpoint: what it exports to, computed from its own weights at this layout."""
    with side(path, launcher, progress) as exported:
        return verify(
            exported.folder,
            layout,
            asked,
            launcher,
            megatron=exported.megatron,
            progress=progress,
        )


def run_other(folder: Path, job: Workload) -> ReferenceResult:
    """On one rank: Transformers' fp32 run of another folder."""
    import torch

    from exaone_bridge.verification.workflow.transformers import capture_transformers, load

    model = load(folder, torch.float32)
    return ReferenceResult(
        [capture_transformers(model, job.points, *batch, perturbed=False) for batch in job.runs()]
    )


def compare(
    source: Path,
    other: Path,
    layout: Layout,
    asked: VerifyOptions,
    launcher: Launcher,
    *,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Check that two models are the same on disk and compute the same.

    The source's logits are Transformers'; so are the other's, unless it is a Megatron checkpoint: then they are
    Megatron-Core's, at this layout.

    Raises:
        CheckpointError: a folder whose tensors or configuration cannot be read.
        BridgeError: a source that is no good by itself.
    """
    started = time.perf_counter()
    with (
        side(source, launcher, progress) as left,
        side(other, launcher, progress) as right,
    ):
        first = HFCheckpoint.open(left.folder)
        gradients = asked.gradients and right.megatron is not None
        job = make_workload(first, layout, dataclasses.replace(asked, gradients=gradients))
        before = digest_folder(left.folder)
        checks = [
            compare_digests(before, digest_folder(right.folder)),
            compare_configs(first.config, read_json(right.folder / "config.json")),
            compare_files(left.folder, right.folder),
        ]
        why = _cannot_run(first, right.folder)
        if why:
            found = ArithmeticResult(
                (Check("logits", "the other model cannot be run", False, why),)
            )
        else:
            found, generated = _run(left, right, first, job, launcher, progress)
            checks += generated
    seconds = time.perf_counter() - started
    return make_report(
        first, job, before, checks, found, seed=asked.seed, seconds=seconds, other=right.name
    )


def _cannot_run(first: HFCheckpoint, folder: Path) -> str:
    """Why the other model cannot be run on the first's prompts; empty if it can."""
    try:
        second = HFCheckpoint.open(folder)
    except BridgeError as error:
        return str(error)
    if second.model_config.vocab_size != first.model_config.vocab_size:
        return f"its vocabulary has {second.model_config.vocab_size} words, and the source's {first.model_config.vocab_size}"
    return ""


def _run(
    left: Side,
    right: Side,
    first: HFCheckpoint,
    job: Workload,
    launcher: Launcher,
    progress: Progress,
) -> tuple[ArithmeticResult, list[Check]]:
    from exaone_bridge.verification.workflow.job import run_transformers
    from exaone_bridge.verification.workflow.megatron import merge

    theirs = launcher.first(run_transformers, left.folder, job, progress=progress)
    gradients = None
    if right.megatron is None:
        ours = launcher.first(run_other, right.folder, job).runs
    else:
        arguments: tuple[Any, ...] = (right.folder, right.megatron, None, {}, job)
        results = launcher.all(run_megatron, *arguments, progress=progress)
        ours = [
            merge([result.runs[number] for result in results]) for number in range(len(job.batches))
        ]
        gradients = results[0].gradients
    found = arithmetic(theirs, ours, gradients, first, job)
    if not job.generate:
        return found, []
    progress.stage("generation from the other model")
    return found, [
        compare_generation(
            theirs.generated or {}, launcher.first(run_generation, right.folder, job)
        )
    ]
