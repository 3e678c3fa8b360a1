"""Verification of a model: `exaone_bridge.verify` is the function `verify`. No torch until the call."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.schema.parallel_layout import Layout

if TYPE_CHECKING:
    from exaone_bridge.runtime.launch import Launcher
    from exaone_bridge.verification.report.report import Report

__all__ = ["verify"]


def verify(
    source: str | Path,
    other: str | Path | None = None,
    *,
    layout: Layout | None = None,
    backend: str = "auto",
    dtype: str = "float32",
    quick: bool = False,
    count: int = 3,
    length: int | None = None,
    seed: int = 0,
    generation: bool | None = None,
    gradients: bool = False,
    mtp: bool = False,
    stream: bool | None = None,
    command: str = "",
    launcher: Launcher | None = None,
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Check a model's round trip through Megatron-Core and its logits against Transformers, or two models.

    Args:
        source, other: Hugging Face folders or Megatron checkpoints; other None: the source alone.
        layout: of Megatron-Core's side; None: one rank.
        backend: `auto`, `transformer_engine` or `torch`.
        dtype: of the arithmetic: `float32`, `bfloat16` or `float16`.
        quick: one prompt for each length, and no generation.
        count, length, seed: of the prompts; length None: past the window and RoPE's own length where affordable.
        generation: greedy generation before and after; None: unless quick.
        gradients: also those of one step, in fp32.
        mtp: build multi-token prediction, whose tensors then go through Megatron-Core and not beside it.
        stream: a layer at a time on both sides; None: where the weights would take more than 2 GiB in fp32.
        command: what the report says it came from.
        launcher: runs both sides' work; None: on torchrun's ranks, or on forked ones.
        progress: is told of each stage.

    Returns:
        The report; `report.passed` says whether every check does. Nothing is raised for a difference.

    Raises:
        BridgeError: bad input.

    Example:
        >>> import exaone_bridge
        >>> report = exaone_bridge.verify("/models/EXAONE-4.0-1.2B")
        >>> assert report.passed, report.failures()
    """
    from exaone_bridge.runtime.launch import choose_launcher
    from exaone_bridge.verification.workflow.compare import compare, is_megatron, verify_megatron
    from exaone_bridge.verification.workflow.job import VerifyOptions
    from exaone_bridge.verification.workflow.layerwise import is_layerwise, verify_layerwise
    from exaone_bridge.verification.workflow.verify import verify

    source = Path(source)
    layout = layout or Layout()
    launcher = launcher or choose_launcher(layout.ranks)
    asked = VerifyOptions(
        backend=backend,
        dtype=dtype,
        count=1 if quick else count,
        length=length,
        seed=seed,
        generation=not quick if generation is None else generation,
        gradients=gradients,
        mtp=mtp,
    )
    if mtp and (other is not None or is_megatron(source)):
        raise UnsupportedConfig(
            "--mtp", got=True, wanted="off but for one Hugging Face folder", where="verify"
        )
    if other is not None:
        report = compare(source, Path(other), layout, asked, launcher, progress=progress)
    elif is_megatron(source):
        report = verify_megatron(source, layout, asked, launcher, progress=progress)
    elif is_layerwise(source, stream):
        report = verify_layerwise(source, layout, asked, launcher, progress=progress)
    else:
        report = verify(source, layout, asked, launcher, progress=progress)
    return dataclasses.replace(report, command=command)
