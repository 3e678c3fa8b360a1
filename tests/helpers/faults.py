"""Shared code of the fault tests: one process per tiny model, into which faults are injected.

The process makes the reference run and the fault-free Megatron-Core model of its tiny model once.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.errors import BridgeError
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.self_test.fault import Fault
from exaone_bridge.verification.self_test.injection import FaultInjector
from exaone_bridge.verification.self_test.outcome import Findings, Outcome
from exaone_bridge.verification.self_test.registry import faults_of, representative_faults

CLEAN = "no fault"


def fault_params(model: str) -> list[Any]:
    """The faults of a tiny model as pytest parameters; all but the representative ones are slow."""
    quick = representative_faults()
    return [
        pytest.param(fault, id=fault.name, marks=() if fault in quick else pytest.mark.slow)
        for fault in faults_of(model)
    ]


class FaultProcess:
    """A process with a `FaultInjector` of one tiny model.

    Args:
        work: an empty folder.
        model: the name of the tiny model.
    """

    def __init__(self, work: Path, model: str) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, remote = context.Pipe()
        self._process = context.Process(
            target=_run, args=(self._connection, remote, work, model), daemon=False
        )
        self._process.start()
        remote.close()

    def findings(self, fault: str) -> Findings:
        """What the checks find with the fault of this name, or with `CLEAN`.

        Raises:
            Exception: as the verification raised it.
        """
        self._connection.send(fault)
        found = self._connection.recv()
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, Findings)
        return found

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _run(local: Connection, remote: Connection, work: Path, model: str) -> None:
    local.close()  # so that `remote` ends when the tests' process closes its end
    ForkLauncher().first(_serve, remote, work, model)


def _serve(remote: Connection, work: Path, model: str) -> None:
    """On a rank: answer the name of a fault with findings, or with the error that was raised."""
    injector = FaultInjector(work, model)
    faults = {fault.name: fault for fault in faults_of(model)}
    while True:
        try:
            name = remote.recv()
        except EOFError:
            return
        try:
            found: object = injector.clean() if name == CLEAN else injector.inject(faults[name])
        except Exception as error:
            found = error if isinstance(error, BridgeError) else RuntimeError(repr(error))
        remote.send(found)


class Injections:
    """Injects faults, in one process per tiny model, which starts with its first fault."""

    def __init__(self, work: Path) -> None:
        self._work, self._processes = work, {}  # type: ignore[var-annotated]

    def findings(self, model: str, fault: str = CLEAN) -> Findings:
        """What the checks find in a tiny model with the fault of this name, or without a fault."""
        if model not in self._processes:
            self._processes[model] = FaultProcess(self._work, model)
        return self._processes[model].findings(fault)

    def __call__(self, fault: Fault) -> Outcome:
        return Outcome(fault, self.findings(fault.model, fault.name))

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.close()


def assert_caught(outcome: Outcome) -> None:
    """The fault is caught and located, and no fault hides near the threshold of the logits."""
    assert outcome.passed, outcome.failure()
    subtle = outcome.fault.name == "epsilon 1e-5 instead of 1e-6"  # a tenth of the next smallest
    if outcome.fault.site is not None and not subtle:
        assert outcome.logit_metrics["max"] > 1e-3


def assert_clean(findings: Findings) -> None:
    """Every check passes, and the logits are within 1e-4 of the reference."""
    assert findings.failed == () and findings.divergence is None, findings.failures()
    assert {check.name for check in findings.checks} == {"tensors", "config", "files", "logits"}
    assert findings.checks[-1].metrics["max"] <= 1e-4


def export(folder: Path, layout: Layout) -> list[list[str]]:
    """Load a folder and export its tensors through `AutoBridge.export_hf_weights`.

    Returns:
        The names that each rank exported.
    """
    return ForkLauncher(layout.ranks).all(_export, folder, layout)


def _export(folder: Path, layout: Layout) -> list[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout)
    return [name for name, _ in bridge.export_hf_weights(model, cpu=True, show_progress=False)]
