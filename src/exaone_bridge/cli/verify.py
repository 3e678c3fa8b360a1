"""The command `verify`: calls the verification, writes its reports and prints the checks."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from exaone_bridge.cli.outputs import STANDARD_OUTPUT, check_outputs, unwritable, write_json
from exaone_bridge.cli.parser import UsageError
from exaone_bridge.cli.show import on_stderr, say, stages, table
from exaone_bridge.errors import ParityFailure
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.report.report import Report

__all__ = ["print_report", "verify"]


def verify(options: Namespace, layout: Layout) -> None:
    """Verify one model, or compare two; with `self_test`, verify the verification.

    Args:
        options: the arguments that `cli.arguments` defines for `verify`.
        layout: the layout of the Megatron-Core side.

    Raises:
        BridgeError: an argument makes no sense, or a report cannot be written, which is found
            before anything is computed.
        ParityFailure: a check fails; reports have been printed and written by then.
    """
    with on_stderr(options.json == STANDARD_OUTPUT):
        if options.self_test:
            _self_test(options.json)
        else:
            _verify(options, layout)


def _verify(options: Namespace, layout: Layout) -> None:
    if options.source is None:
        raise UsageError(
            "SOURCE is missing, the folder to verify (only --self-test needs none); "
            "`exaone-bridge verify --help` lists the arguments."
        )
    check_outputs([options.json, options.report, options.card])
    from exaone_bridge.runtime.launch import choose_launcher, is_rank_zero
    from exaone_bridge.verification import verify as run_verification

    with choose_launcher(layout.ranks) as launcher:
        with stages("verify", shown=is_rank_zero()) as progress:
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
            print_report(report)  # first: a report that cannot be written must not hide the result
            _write(report, options)
    if not report.passed:
        raise ParityFailure(report.failures() if is_rank_zero() else "")


def _write(report: Report, options: Namespace) -> None:
    """Write the reports.

    Raises:
        OutputError: one cannot be written, and all checks passed.
        ParityFailure: one cannot be written, and a check failed.
    """
    try:
        if options.json is not None:
            write_json(report.to_dict(), options.json)
        if options.report is not None:
            report.write_html(options.report)
        if options.card is not None:
            from exaone_bridge.verification.report.card import write_card

            write_card(report, options.card, name=options.name or report.source, note=options.note)
    except OSError as error:
        problem = unwritable(error.filename or "report", error)
        if report.passed:
            raise problem from error
        raise ParityFailure(f"{report.failures()}\nexaone-bridge: {problem}") from error


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
            say(f"The check of {check.name} was not run: {check.details}.")


def _self_test(json_: Path | None) -> None:
    from exaone_bridge.verification.self_test.run import self_test

    check_outputs([json_])
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
        write_json(result.to_dict(), json_)
    if not result.passed:
        raise ParityFailure(result.failures())
