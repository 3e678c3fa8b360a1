"""The command `verify`: its options, and what it prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from exaone_bridge.cli.show import say, stages, table
from exaone_bridge.errors import ParityFailure, UnsupportedConfig
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["print_report", "verify"]

_LAYOUT = "Layout of Megatron-Core's side"


def verify(
    source: Annotated[
        Path | None,
        typer.Argument(help="A Hugging Face folder or a Megatron checkpoint.", show_default=False),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Argument(help="Another; left out: SOURCE's own round trip.", show_default=False),
    ] = None,
    tp: Annotated[
        int, typer.Option("--tp", help="Tensor-parallel size.", min=1, rich_help_panel=_LAYOUT)
    ] = 1,
    pp: Annotated[
        int, typer.Option("--pp", help="Pipeline-parallel size.", min=1, rich_help_panel=_LAYOUT)
    ] = 1,
    vpp: Annotated[
        int,
        typer.Option(
            "--vpp", help="Virtual pipeline stages per rank.", min=1, rich_help_panel=_LAYOUT
        ),
    ] = 1,
    sp: Annotated[
        bool,
        typer.Option(
            "--sp", help="Sequence parallelism over the TP ranks.", rich_help_panel=_LAYOUT
        ),
    ] = False,
    ep: Annotated[
        int,
        typer.Option("--ep", help="Expert-parallel size.", min=1, rich_help_panel=_LAYOUT),
    ] = 1,
    etp: Annotated[
        int | None,
        typer.Option(
            "--etp",
            help="Expert tensor-parallel size; default: --tp.",
            min=1,
            rich_help_panel=_LAYOUT,
        ),
    ] = None,
    cp: Annotated[
        int,
        typer.Option("--cp", help="Context-parallel size.", min=1, rich_help_panel=_LAYOUT),
    ] = 1,
    backend: Annotated[
        str,
        typer.Option(
            "--backend", help="auto, transformer_engine or torch.", rich_help_panel=_LAYOUT
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the arithmetic: float32, bfloat16 or float16.")
    ] = "float32",
    quick: Annotated[
        bool, typer.Option("--quick", help="One prompt of each length, no generation.")
    ] = False,
    count: Annotated[int, typer.Option(help="Long prompts.", min=1)] = 3,
    length: Annotated[
        int | None,
        typer.Option(help="Positions of a prompt; default: past the window and RoPE's own.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.", min=0)] = 0,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also the gradients of one step.")
    ] = False,
    mtp: Annotated[
        bool,
        typer.Option(
            "--mtp",
            help="Build multi-token prediction too; else its tensors travel beside the model.",
        ),
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="A layer at a time on both sides; default: above 2 GiB in fp32.",
        ),
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option("--report", help="Write the report as one HTML file.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="Write or extend a model card (Markdown).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the card calls the model; default: the folder.")
    ] = None,
    note: Annotated[
        str, typer.Option(help="A sentence for the card: what was verified in place of what.")
    ] = "",
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test", help="Plant faults in miniatures, and show that each is caught."
        ),
    ] = False,
) -> None:
    """Round trip through Megatron-Core and logits against Transformers; or one model against another."""
    layout = Layout(tp=tp, pp=pp, vpp=vpp, sp=sp, ep=ep, etp=etp, cp=cp)
    if self_test:
        _self_test(json_)
        return
    if source is None:
        raise UnsupportedConfig(
            "SOURCE", got=None, wanted="a folder (or --self-test)", where="command line"
        )
    _check_outputs(json_, html, card)
    from exaone_bridge.runtime.launch import choose_launcher, is_rank_zero
    from exaone_bridge.verification import verify_model

    with choose_launcher(layout.ranks) as launcher:
        with stages("verify", shown=is_rank_zero()) as progress:
            progress.stage("importing Megatron-Core (half a minute)")
            report = verify_model(
                source,
                other,
                layout=layout,
                backend=backend,
                dtype=dtype,
                quick=quick,
                count=count,
                length=length,
                seed=seed,
                gradients=gradients,
                mtp=mtp,
                stream=stream,
                command=_command(),
                launcher=launcher,
                progress=progress,
            )
        if is_rank_zero():
            if json_ is not None:
                report.write_json(json_)
            if html is not None:
                from exaone_bridge.verification.report.html import write_html

                write_html(report, html)
            if card is not None:
                from exaone_bridge.verification.report.card import write_card

                write_card(report, card, name=name or report.source, note=note)
            print_report(report)
    if not report.passed:
        raise ParityFailure(report.faults() if is_rank_zero() else "")


def _command() -> str:
    return shlex.join(["exaone-bridge", *sys.argv[1:]])


def _check_outputs(*paths: Path | None) -> None:
    """Before half an hour of work, not after it."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UnsupportedConfig(
                "output",
                got=str(path),
                wanted="a file in a folder that is there",
                where="command line",
            )


def print_report(report: Any) -> None:
    """The checks, a line each."""
    name = report.source if report.other is None else f"{report.source} against {report.other}"
    table(
        f"{name}, {report.parameters:,} parameters, {report.layout}, {report.dtype}, {report.seconds:.1f} s",
        ["check", "figure", "held against", "verdict"],
        [
            [
                check.name,
                check.figure,
                check.bound,
                check.verdict.upper() if not check.passed else check.verdict.value,
            ]
            for check in report.checks
        ],
    )
    for check in report.checks:
        if not check.ran:
            say(f"{check.name} was not run: {check.where}.")


def _self_test(json_: Path | None) -> None:
    from exaone_bridge.verification.self_test.run import self_test

    _check_outputs(json_)
    with stages("self-test") as progress:
        progress.stage("importing Megatron-Core (half a minute)")
        result = self_test(progress=progress)
    table(
        f"{len(result.outcomes)} planted faults, {result.clean} clean models, {result.seconds:.0f} s",
        [
            "fault",
            "model",
            "caught by",
            "begins at",
            "host: cosine",
            "host: weights",
            "host's verdict",
        ],
        [outcome.cells() for outcome in result.outcomes],
    )
    say(result.score())
    if json_ is not None:
        result.write_json(json_)
    if not result.passed:
        raise ParityFailure(result.faults())
