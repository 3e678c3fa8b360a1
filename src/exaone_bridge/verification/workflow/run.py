"""The workflow of a verification: two models, what they have on disk, and what they compute.

The reference is always Transformers with the source. A model that Transformers computes
differently (`ModelConfig.transformers_differs`) has no reference: what it has on disk is compared,
and it is not run. The other model is the source after a round trip through Megatron-Core, or
another checkpoint: with Transformers if it is a Hugging Face folder, with Megatron-Core if it is a
Megatron checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.errors import BridgeError, UnsupportedConfig
from exaone_bridge.runtime.launch import Launcher, choose_launcher
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.compare import compare_activations
from exaone_bridge.verification.activations.divergence import first_divergence
from exaone_bridge.verification.checks.digests import Digest, digest_folder, digest_tensors
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
)
from exaone_bridge.verification.checks.generation import compare_generation
from exaone_bridge.verification.checks.gradients import Gradients, compare_gradients
from exaone_bridge.verification.checks.logits import compare_half_precision, compare_logits
from exaone_bridge.verification.report.provenance import device, revision
from exaone_bridge.verification.report.report import (
    ActivationDiff,
    Check,
    Divergence,
    Report,
    versions,
)
from exaone_bridge.verification.report.summary import model_summary
from exaone_bridge.verification.workflow.checkpoints import Checkpoint, as_hf_folder
from exaone_bridge.verification.workflow.megatron import (
    merge_ranks,
    run_megatron,
    run_megatron_layerwise,
)
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.transformers import (
    ReferenceResult,
    run_generation,
    run_other_transformers,
    run_transformers,
)
from exaone_bridge.verification.workflow.workload import Workload, make_workload

__all__ = ["ArithmeticResult", "Session", "compare_arithmetic", "run"]

_NEEDS_FULL_MODEL = "it needs the full model in memory (--no-stream)"
_NEEDS_OUTPUT_LAYER = "the model has a head, and no output layer that predicts the next token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is verified, and where it runs.

    Attributes:
        source, other: as `exaone_bridge.verify` takes them.
        command: the command line, for the report.
        launcher: None: torchrun's ranks, or forked ranks.
    """

    source: Path
    other: Path | None = None
    layout: Layout = field(default_factory=Layout)
    options: VerifyOptions = field(default_factory=VerifyOptions)
    command: str = ""
    launcher: Launcher | None = None
    progress: Progress = NO_PROGRESS


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The model that is compared with the reference.

    Attributes:
        folder: its Hugging Face folder; layer by layer, without weights.
        digests: its tensors.
        configs: its `config.json`, and the config of the Megatron-Core model.
        activations: in the workload's dtype, one for each batch.
    """

    folder: Path
    digests: Mapping[str, Digest]
    configs: Sequence[JSONMapping]
    activations: Sequence[Activations] = ()
    gradients: Gradients | None = None


@dataclass(frozen=True, slots=True)
class ArithmeticResult:
    """The comparison of logits, activations and gradients."""

    checks: tuple[Check, ...]
    activations: tuple[ActivationDiff, ...] = ()
    divergence: Divergence | None = None


def run(session: Session) -> Report:
    """Run both models and compare them.

    Raises:
        BridgeError: the input cannot be verified.
    """
    started, date = time.perf_counter(), datetime.now().astimezone()
    progress = session.progress
    with contextlib.ExitStack() as stack:
        launcher = session.launcher
        if launcher is None:  # else its owner ends it
            launcher = stack.enter_context(choose_launcher(session.layout.ranks))
        source = stack.enter_context(as_hf_folder(session.source, launcher, progress))
        other: Checkpoint | None = None
        if session.other is not None:
            other = stack.enter_context(as_hf_folder(session.other, launcher, progress))
        checkpoint = HFCheckpoint.open(source.folder)
        workload = make_workload(checkpoint, session.layout, _options(session, source, other))
        tensors = digest_tensors(checkpoint.tensors)
        without_reference = checkpoint.model_config.transformers_differs
        if without_reference:
            workload = dataclasses.replace(
                workload, batches=(), generate=False, gradient_batch=None
            )
        other_checkpoint, problem = (
            (None, "") if other is None else _open_other(checkpoint, other.folder)
        )
        reference: ReferenceResult | None = None
        if not problem and not without_reference:
            reference = launcher.first(run_transformers, checkpoint, workload, progress=progress)
        if other is None:
            work = stack.enter_context(launcher.folder())
            compared = _round_trip(
                checkpoint, source.megatron, tensors, workload, work, launcher, progress
            )
        else:
            runnable = None if without_reference else other_checkpoint
            compared = _run_other(checkpoint, other, runnable, workload, launcher, progress)
        checks = [
            compare_digests(tensors, compared.digests),
            compare_configs(checkpoint.config, *compared.configs),
            compare_files(source.folder, compared.folder),
        ]
        if without_reference:
            arithmetic = ArithmeticResult(())
        elif reference is None:
            check = Check("logits", "the other model cannot be run", False, problem)
            arithmetic = ArithmeticResult((check,))
        else:
            if workload.generate:
                progress.stage("greedy generation of the other model")
                generated = launcher.first(run_generation, compared.folder, workload)
                checks.append(compare_generation(reference.generated or {}, generated))
            arithmetic = compare_arithmetic(
                reference,
                compared.activations,
                compared.gradients,
                checkpoint.model_config,
                workload,
            )
        device_name = launcher.first(device)
    return Report(
        source=source.name,
        other=None if other is None else other.name,
        layout=str(workload.layout),
        checks=(
            *checks,
            *arithmetic.checks,
            *_not_run(session.options, workload, checkpoint.model_config),
        ),
        backend=workload.backend,
        dtype=workload.dtype,
        model=model_summary(checkpoint),
        activations=arithmetic.activations,
        divergence=arithmetic.divergence,
        tensors={name: digest.to_dict() for name, digest in tensors.items()},
        notes=checkpoint.notes,
        setup=workload.setup(),
        versions=versions(),
        command=session.command,
        seconds=time.perf_counter() - started,
        date=date.isoformat(timespec="seconds"),
        host=platform.node(),
        device=device_name,
        folder=str(session.source.absolute()),
        revision=revision(session.source),
        other_folder="" if session.other is None else str(session.other.absolute()),
        other_revision="" if session.other is None else revision(session.other),
    )


def _options(session: Session, source: Checkpoint, other: Checkpoint | None) -> VerifyOptions:
    """Drop the options that do not apply to what is compared.

    Raises:
        UnsupportedConfig: multi-token prediction, which only a round trip of a Hugging Face folder
            can build.
    """
    options = session.options
    if other is None and source.megatron is None:
        return options
    if options.mtp:
        raise UnsupportedConfig(
            "--mtp", got=True, wanted="off but for one Hugging Face folder", where="verify"
        )
    with_megatron = other is None or other.megatron is not None
    return dataclasses.replace(options, stream=False, gradients=options.gradients and with_megatron)


def _not_run(options: VerifyOptions, workload: Workload, model_config: ModelConfig) -> list[Check]:
    """List the requested checks that need a reference, an output layer, or all weights at once."""
    without_reference = model_config.transformers_differs
    full = without_reference or (_NEEDS_FULL_MODEL if workload.layerwise else None)
    reasons = {
        "generation": (options.generation, _NEEDS_OUTPUT_LAYER if model_config.head else full),
        "logits": (True, without_reference),
        "gradients": (options.gradients, full),
    }
    return [
        Check.not_run(name, reason)
        for name, (wanted, reason) in reasons.items()
        if wanted and reason is not None
    ]


def _open_other(checkpoint: HFCheckpoint, folder: Path) -> tuple[HFCheckpoint | None, str]:
    """Open another model, if it can run the source's prompts.

    Returns:
        The model, and an empty string; or None, and why it cannot be run.
    """
    try:
        other = HFCheckpoint.open(folder)
    except BridgeError as error:
        return None, str(error)
    size, expected = other.model_config.vocab_size, checkpoint.model_config.vocab_size
    if size != expected:
        return None, f"its vocabulary has {size} tokens, the source's {expected}"
    if other.model_config.head != checkpoint.model_config.head:
        return None, "it has another head than the source"
    return other, ""


def _round_trip(
    checkpoint: HFCheckpoint,
    megatron: Path | None,
    tensors: Mapping[str, Digest],
    workload: Workload,
    work: Path,
    launcher: Launcher,
    progress: Progress,
) -> OtherModel:
    """Run the source with Megatron-Core, and export it.

    Args:
        megatron: the Megatron checkpoint that the weights come from; None: `checkpoint`.
        tensors: the digests of the source's tensors.
        work: an empty folder.
    """
    if workload.layerwise:
        folder = work
        ranks = launcher.all(
            run_megatron_layerwise, checkpoint, folder, workload, progress=progress
        )
        result = merge_ranks(ranks)
        passthrough = {name: tensors[name] for name in checkpoint.passthrough}
        digests = passthrough | result.digests
    else:
        folder = work / checkpoint.folder.name
        ranks = launcher.all(
            run_megatron, checkpoint, megatron, folder, workload, progress=progress
        )
        result = merge_ranks(ranks)
        digests = digest_folder(folder)
    return OtherModel(
        folder,
        digests,
        (read_json(folder / "config.json"), result.model_config),
        result.activations,
        result.gradients,
    )


def _run_other(
    checkpoint: HFCheckpoint,
    other: Checkpoint,
    opened: HFCheckpoint | None,
    workload: Workload,
    launcher: Launcher,
    progress: Progress,
) -> OtherModel:
    """Run another checkpoint: a Megatron checkpoint with Megatron-Core, others with Transformers.

    Args:
        opened: `other`, opened; None if it cannot be run.
    """
    digests = digest_folder(other.folder) if opened is None else digest_tensors(opened.tensors)
    config = read_json(other.folder / "config.json")
    compared = OtherModel(other.folder, digests, (config,))
    if opened is None:
        return compared
    if other.megatron is None:
        activations = launcher.first(run_other_transformers, opened, workload, progress=progress)
        return dataclasses.replace(compared, activations=activations)
    ranks = launcher.all(run_megatron, opened, other.megatron, None, workload, progress=progress)
    merged = merge_ranks(ranks)
    return dataclasses.replace(compared, activations=merged.activations, gradients=merged.gradients)


def compare_arithmetic(
    reference: ReferenceResult,
    activations: Sequence[Activations],
    gradients: Gradients | None,
    model_config: ModelConfig,
    workload: Workload,
) -> ArithmeticResult:
    """Compare what both models compute.

    Args:
        activations: the other model's, one for each batch.
        gradients: the other model's, Hugging Face name -> `[*weight.shape]`, if the workload has a
            training step.
    """
    differences = compare_activations(
        workload.points, reference.activations, activations, model_config, reference.half_precision
    )
    if reference.half_precision is None:
        logits = compare_logits(reference.activations, activations, differences)
        divergence = first_divergence(differences)
    else:
        logits = compare_half_precision(
            reference.activations, reference.half_precision, activations, workload.dtype
        )
        # In half precision a diverging activation explains a failed check, and does not fail it.
        divergence = None if logits.passed else first_divergence(differences)
    if divergence is not None:  # also if the logits do not show it
        logits = dataclasses.replace(logits, passed=False, details=str(divergence))
    checks = [logits]
    if workload.gradient_batch is not None:
        assert reference.gradients is not None and gradients is not None
        count, length = workload.gradient_batch.tokens.shape
        tokens = count * (length - 1)
        checks.append(compare_gradients(reference.gradients, gradients, model_config, tokens))
    return ArithmeticResult(tuple(checks), differences, divergence)
