"""Runs the self-test: every injected fault, and models without a fault from many seeds.

There is one process for each tiny model, in which the reference run is made once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.verification.self_test.fault import Fault
from exaone_bridge.verification.self_test.outcome import Findings, Outcome, SelfTestResult
from exaone_bridge.verification.self_test.registry import FAULTS, MODELS

__all__ = ["SEEDS", "run_model", "self_test"]

SEEDS = 20
"""The number of seeds from which clean models of each tiny model are made."""


def run_model(
    work: Path,
    model: str,
    faults: Sequence[Fault],
    seeds: Sequence[int],
    progress: Progress = NO_PROGRESS,
) -> tuple[list[Findings], list[str]]:
    """Inject faults into one tiny model, and verify it without a fault; runs on a rank.

    Returns:
        The findings of each fault; and one line for each check that fails without a fault.
    """
    from exaone_bridge.verification.self_test.injection import FaultInjector

    first = FaultInjector(work, model, seed=0)
    findings: list[Findings] = []
    for number, fault in enumerate(faults):
        if number % 5 == 0:
            progress.stage(f"{model}: {number} of {len(faults)} faults")
        findings.append(first.inject(fault))
    false_reports: list[str] = []
    for number, seed in enumerate(seeds):
        progress.stage(f"{model}: {number} of {len(seeds)} clean models")
        injector = FaultInjector(work, model, seed) if seed else first
        false_reports += [f"{model}, seed {seed}: {line}" for line in injector.clean().failures()]
    return findings, false_reports


def self_test(
    faults: Sequence[Fault] = FAULTS,
    seeds: int = SEEDS,
    models: Sequence[str] = MODELS,
    progress: Progress = NO_PROGRESS,
) -> SelfTestResult:
    """Inject faults one at a time, and verify models without a fault.

    Args:
        faults: the faults to inject.
        seeds: the number of clean models of each tiny model.
        models: the tiny models whose clean models are verified.
        progress: receives the stages.
    """
    from exaone_bridge.bridge.registration import supported
    from exaone_bridge.runtime.fork import ForkLauncher

    started = time.perf_counter()
    supported()
    outcomes: list[Outcome] = []
    reports: list[str] = []
    for model in dict.fromkeys((*(fault.model for fault in faults), *models)):
        mine = [fault for fault in faults if fault.model == model]
        numbers = range(seeds if model in models else 0)
        with tempfile.TemporaryDirectory(prefix="exaone_bridge-self-test-") as work:
            findings, false = ForkLauncher().first(
                run_model, Path(work), model, mine, numbers, progress=progress
            )
        outcomes += map(Outcome, mine, findings)
        reports += false
    return SelfTestResult(
        tuple(outcomes), seeds * len(models), tuple(reports), time.perf_counter() - started
    )
