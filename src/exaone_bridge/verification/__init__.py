"""Verification of a model's conversion; `exaone_bridge.verify` is this package's `verify`.

No torch is imported before the call.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.runtime.progress_bar import shown_progress

if TYPE_CHECKING:
    from exaone_bridge.runtime.launch import Launcher
    from exaone_bridge.runtime.progress import Progress
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification.report.report import Report

__all__ = ["verify"]


def verify(
    source: str | Path,
    other: str | Path | None = None,
    *,
    layout: Layout | None = None,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    sp: bool = False,
    ep: int = 1,
    etp: int | None = None,
    cp: int = 1,
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
    progress: Progress | bool | None = None,
) -> Report:
    """Verify a model's round trip through Megatron-Core, or compare two models.

    The model is loaded and exported with AutoBridge's own calls, as a user's script does, and its
    logits in Megatron-Core are compared with Transformers'. Thresholds are derived, not configured
    (docs/verification.md).

    Args:
        source: a Hugging Face folder or a Megatron checkpoint.
        other: a folder or checkpoint to compare with it; None: the source's own round trip.
        layout: the parallel layout of the Megatron-Core model; None: that of the sizes.
        tp, pp, vpp, sp, ep, etp, cp: the sizes of `Layout`, in place of a layout.
        backend: `auto`, `transformer_engine` or `torch`.
        dtype: of the arithmetic: `float32`, `bfloat16` or `float16`.
        quick: use one prompt of each length, and skip generation.
        count: number of long prompts.
        length: tokens of a prompt; None: longer than the sliding window and than RoPE's original
            length, if that is affordable.
        seed: of the prompts.
        generation: compare greedy generation before and after; None: unless `quick`.
        gradients: compare the gradients of one training step too, in fp32.
        mtp: build multi-token prediction into the model; its tensors then go through Megatron-Core,
            and are not passthrough tensors.
        stream: verify layer by layer, with one layer's weights in memory at a time; None: if the
            model has more than 2 GiB in fp32.
        command: the command line, for the report.
        launcher: runs the work of both models; None: torchrun's ranks, or forked ranks.
        progress: whether to show the stages, or an object that receives their names; None: on a
            terminal and in a notebook.

    Returns:
        The report. A failed check is in it, and raises nothing.

    Raises:
        BridgeError: the input cannot be verified; the error says why.

    Example:
        >>> import exaone_bridge
        >>> report = exaone_bridge.verify("/models/EXAONE-4.0-1.2B", tp=2)
        >>> assert report.passed, report.failures()
    """
    from exaone_bridge.schema.parallel_layout import Layout

    layout = Layout.of(layout, Layout(tp=tp, pp=pp, vpp=vpp, sp=sp, ep=ep, etp=etp, cp=cp))
    with shown_progress("verify", progress) as shown:
        shown.stage("importing Megatron-Core (half a minute)")
        from exaone_bridge.verification.workflow.options import VerifyOptions
        from exaone_bridge.verification.workflow.run import Session, run

        options = VerifyOptions(
            backend=backend,
            dtype=dtype,
            count=1 if quick else count,
            length=length,
            seed=seed,
            generation=not quick if generation is None else generation,
            gradients=gradients,
            mtp=mtp,
            stream=stream,
        )
        session = Session(
            source=Path(source),
            other=None if other is None else Path(other),
            layout=layout,
            options=options,
            command=command,
            launcher=launcher,
            progress=shown,
        )
        return run(session)
