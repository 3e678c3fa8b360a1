"""Plants every fault, asks the checks, and asks the host's criteria beside them; then clean models, which must hold.

One process for each family: Megatron-Core is imported once, Transformers' reference computed once.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.verification.report.report import Check, Divergence
from exaone_bridge.verification.self_test.ernie45_faults import ERNIE45_FAULTS
from exaone_bridge.verification.self_test.exaone4_faults import EXAONE4_FAULTS
from exaone_bridge.verification.self_test.exaone45_faults import EXAONE45_FAULTS
from exaone_bridge.verification.self_test.fault import Fault
from exaone_bridge.verification.self_test.folder_faults import FOLDER_FAULTS
from exaone_bridge.verification.self_test.upstream_criteria import UpstreamVerdict

__all__ = ["FAULTS", "Outcome", "Result", "self_test"]

FAULTS: tuple[Fault, ...] = (*EXAONE4_FAULTS, *EXAONE45_FAULTS, *ERNIE45_FAULTS, *FOLDER_FAULTS)
SEEDS = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was said about one planted fault."""

    fault: str
    model: str
    wanted: tuple[str, ...]
    begins: tuple[int | None, str] | None
    checks: tuple[Check, ...]
    divergence: Divergence | None
    upstream: UpstreamVerdict

    @property
    def caught(self) -> tuple[str, ...]:
        """The checks that do not hold."""
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def found(self) -> tuple[int | None, str] | None:
        """Layer and sublayer where hidden states part."""
        return (
            None if self.divergence is None else (self.divergence.layer, self.divergence.sublayer)
        )

    @property
    def excess(self) -> float | None:
        """The logits' difference by its bound; None where they were not computed, or are the same by design."""
        if self.begins is None:
            return None
        figures = next(check.metrics for check in self.checks if check.name == "logits")
        return float(figures["relative"] / figures["threshold"])

    @property
    def right(self) -> bool:
        """Whether every check that must catch it does, and it is located where it is."""
        return (
            bool(self.caught) and set(self.wanted) <= set(self.caught) and self.found == self.begins
        )

    def cells(self) -> list[str]:
        """The line of a table."""
        where = (
            "-"
            if self.found is None
            else f"{'-' if self.found[0] is None else self.found[0]} {self.found[1]}"
        )
        caught = ", ".join(self.caught) or "NOT CAUGHT"
        return [
            self.fault,
            self.model,
            caught,
            where if self.right else f"{where} WRONG",
            *self.upstream.cells(),
        ]


@dataclass(frozen=True, slots=True)
class Result:
    """The whole bench."""

    outcomes: tuple[Outcome, ...]
    clean: int
    false_reports: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every fault is caught and located, and no clean model is reported."""
        return all(outcome.right for outcome in self.outcomes) and not self.false_reports

    def score(self) -> str:
        """Two sentences."""
        right = sum(outcome.right for outcome in self.outcomes)
        asked = [outcome for outcome in self.outcomes if outcome.upstream.asked]
        upstream = sum(outcome.upstream.caught for outcome in asked)
        return (
            f"{right} of {len(self.outcomes)} faults caught and located; "
            f"{len(self.false_reports)} false reports on {self.clean} clean models. "
            f"The host's criteria catch {upstream} of the {len(asked)} that they could be asked about."
        )

    def faults(self) -> str:
        """What went wrong, a line each."""
        lines = [
            f"{one.model}: {one.fault}: caught by {one.caught}, must be by {one.wanted}; "
            f"begins at {one.found}, and is at {one.begins}"
            for one in self.outcomes
            if not one.right
        ]
        return "\n".join([*lines, *self.false_reports])

    def write_json(self, path: Path) -> None:
        """Every outcome as plain data."""
        rows = [
            {
                "fault": one.fault,
                "model": one.model,
                "caught_by": list(one.caught),
                "wanted": list(one.wanted),
                "begins": one.begins,
                "found": one.found,
                "right": one.right,
                "excess": one.excess,
                "host": dataclasses.asdict(one.upstream) | {"caught": one.upstream.caught},
            }
            for one in self.outcomes
        ]
        head = {
            "clean": self.clean,
            "false_reports": list(self.false_reports),
            "seconds": self.seconds,
        }
        path.write_text(json.dumps(head | {"outcomes": rows}, indent=2, default=str) + "\n")


def _run_family(
    work: Path, name: str, faults: Sequence[Fault], seeds: Sequence[int], progress: Progress
) -> tuple[list[Outcome], list[str]]:
    from exaone_bridge.verification.self_test.injection import Bench

    outcomes: list[Outcome] = []
    false_reports: list[str] = []
    for number, seed in enumerate(seeds):
        progress.stage(f"{name}: clean models, {number + 1} of {len(seeds)}")
        clean = Bench(work, name, seed)
        checks, location, _ = clean.look(clean.clean)
        false_reports += [
            f"{name}, {seed}: {one.name}: {one.summary}; {one.details}"
            for one in checks
            if not one.passed
        ]
        if location is not None:
            false_reports.append(f"{name}, {seed}: {location}")
    if faults:
        bench = Bench(work, name, seed=len(seeds))
        for number, fault in enumerate(faults):
            if number % 5 == 0:
                progress.stage(f"{name}: {number} of {len(faults)} faults")
            checks, location, upstream = bench.plant(fault)
            outcomes.append(
                Outcome(
                    fault.name,
                    fault.model,
                    fault.caught,
                    fault.begins,
                    tuple(checks),
                    location,
                    upstream,
                )
            )
    return outcomes, false_reports


def self_test(
    faults: Sequence[Fault] = FAULTS,
    seeds: int = SEEDS,
    models: Sequence[str] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Result:
    """Plant these faults, and look at clean models of so many seeds.

    Args:
        models: miniatures whose clean models are looked at; None: those that faults are planted in.
    """
    from exaone_bridge.bridge.registration import supported
    from exaone_bridge.runtime.fork import ForkLauncher

    started = time.perf_counter()
    supported()
    planted_in = tuple(dict.fromkeys(fault.model for fault in faults))
    outcomes: list[Outcome] = []
    false_reports: list[str] = []
    clean = 0
    for name in dict.fromkeys((*planted_in, *(models or ()))):
        mine = [fault for fault in faults if fault.model == name]
        numbers = range(seeds) if models is None or name in models else range(0)
        with tempfile.TemporaryDirectory(prefix="exaone_bridge-bench-") as work:
            found, false = ForkLauncher().first(
                _run_family, Path(work), name, mine, numbers, progress=progress
            )
        outcomes += found
        false_reports += false
        clean += len(numbers)
    return Result(tuple(outcomes), clean, tuple(false_reports), time.perf_counter() - started)
