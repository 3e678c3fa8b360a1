"""The command `verify`: calls the verification, writes its reports and prints the checks."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from exaone_bridge.cli.show import say, stages, table
from exaone_bridge.errors import ParityFailure, UnsupportedConfig
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.report.report import Report

__all__ = ["print_report", "verify"]


def verify(options: Namespace, layout: Layout) -> None:
    """Verify one model, or compare two; with `self_test`, verify the verification.

    Args:
        options: the arguments that `cli.arguments` defines for `verify`.
        layout: the layout of the Megatron-Core side.

    Raises:
        UnsupportedConfig: an argument makes no sense; nothing has been computed by then.
        ParityFailure: a check fails; reports have been written and printed by then.
    """
    if options.self_test:
        _self_test(options.json)
        return
    if options.source is None:
        wanted = "a folder (or --self-test)"
        raise UnsupportedConfig("SOURCE", got=None, wanted=wanted, where="command line")
    _check_outputs(options.json, options.report, options.card)
    from exaone_bridge.runtime.launch import choose_launcher, is_rank_zero
    from exaone_bridge.verification import verify as run_verification

    with choose_launcher(layout.ranks) as launcher:
        with stages("verify", shown=is_rank_zero()) as progress:
            progress.stage("importing Megatron-Core (half a minute)")
            report = run_verification(
                options.source,
                options.other,
                layout=layout,
                backend=options.backend,
                dtype=options.dtype,
                quick=options.quick,
                count=options.count,
                length=options.length,
                seed=options.seed,
                gradients=options.gradients,
                mtp=options.mtp,
                stream=options.stream,
                command=shlex.join(["exaone-bridge", *sys.argv[1:]]),
                launcher=launcher,
                progress=progress,
            )
        if is_rank_zero():
            _write(report, options)
            print_report(report)
    if not report.passed:
        raise ParityFailure(report.failures() if is_rank_zero() else "")


def _write(report: Report, options: Namespace) -> None:
    if options.json is not None:
        report.write_json(options.json)
    if options.report is not None:
        report.write_html(options.report)
    if options.card is not None:
        from exaone_bridge.verification.report.card import write_card

        write_card(report, options.card, name=options.name or report.source, note=options.note)


def _check_outputs(*paths: Path | None) -> None:
    """Reject an output that cannot be written before the verification runs, not after."""
    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            wanted = "a file in a folder that exists"
            raise UnsupportedConfig("output", got=str(path), wanted=wanted, where="command line")


def print_report(report: Report) -> None:
    """Print a table of the checks."""
    name = report.source if report.other is None else f"{report.source} against {report.other}"
    table(
        f"{name}, {report.parameters:,} parameters, {report.layout}, {report.dtype}, "
        f"{report.seconds:.1f} s",
        ["check", "summary", "threshold", "status"],
        [
            [
                check.name,
                check.summary,
                check.threshold,
                check.status.upper() if not check.passed else check.status.value,
            ]
            for check in report.checks
        ],
    )
    for note in report.notes:
        say(f"{report.source}: {note}.")
    for check in report.checks:
        if not check.ran:
            say(f"{check.name} was not run: {check.details}.")


def _self_test(json_: Path | None) -> None:
    from exaone_bridge.verification.self_test.run import self_test

    _check_outputs(json_)
    with stages("self-test") as progress:
        progress.stage("importing Megatron-Core (half a minute)")
        result = self_test(progress=progress)
    table(
        f"{len(result.outcomes)} injected faults, {result.clean_models} clean models, "
        f"{result.seconds:.0f} s",
        ["injected fault", "tiny model", "checks that fail", "first difference", "status"],
        [outcome.cells() for outcome in result.outcomes],
    )
    say(result.summary())
    if json_ is not None:
        result.write_json(json_)
    if not result.passed:
        raise ParityFailure(result.failures())
