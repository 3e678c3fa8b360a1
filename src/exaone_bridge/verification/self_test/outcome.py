"""The outcome of the self-test: for each fault, whether it was caught and located."""

from __future__ import annotations

from dataclasses import dataclass

from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.verification.report.report import Check, Divergence
from exaone_bridge.verification.self_test.fault import Fault, FaultSite

__all__ = ["Findings", "Outcome", "SelfTestResult"]


@dataclass(frozen=True, slots=True)
class Findings:
    """What the checks found in one model.

    Attributes:
        checks: every check that ran.
        divergence: where activations differ first; None: nowhere, or they were not compared.
    """

    checks: tuple[Check, ...]
    divergence: Divergence | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that fail."""
        return tuple(check.name for check in self.checks if not check.passed)

    def failures(self) -> list[str]:
        """Return one line for each check that fails, and one for the divergence."""
        lines = [
            f"{check.name}: {check.summary}; {check.details}"
            for check in self.checks
            if not check.passed
        ]
        return lines if self.divergence is None else [*lines, str(self.divergence)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """An injected fault, and what the checks found."""

    fault: Fault
    findings: Findings

    @property
    def is_caught(self) -> bool:
        """Whether the checks that must fail do, and no others."""
        return set(self.findings.failed) == set(self.fault.failing)

    @property
    def is_located(self) -> bool:
        """Whether activations differ first at the fault's site, or nowhere if it has none."""
        site, found = self.fault.site, self.findings.divergence
        if site is None or found is None:
            return site is None and found is None
        same = (site.layer, site.sublayer) == (found.layer, found.sublayer)
        return same and site.module in ("", found.name)

    @property
    def passed(self) -> bool:
        """Whether the fault is caught and located."""
        return self.is_caught and self.is_located

    @property
    def status(self) -> str:
        """`caught`, `NOT CAUGHT` or `WRONG LOCATION`."""
        if not self.is_caught:
            return "NOT CAUGHT"
        return "caught" if self.is_located else "WRONG LOCATION"

    @property
    def logit_metrics(self) -> JSONMapping:
        """The metrics of the logits; empty where they were not compared."""
        found = [check.metrics for check in self.findings.checks if check.name == "logits"]
        return found[0] if found else {}

    def failure(self) -> str:
        """Return a sentence that says what is wrong with the outcome."""
        fault, found = self.fault, self.findings
        return (
            f"{fault.model}: {fault.name}: the checks that fail are {list(found.failed)} and must "
            f"be {list(fault.failing)}; {found.divergence or 'no activations differ'}, and the "
            f"fault is at {fault.site or 'none of them'}"
        )

    def cells(self) -> list[str]:
        """Return the cells of a table: fault, tiny model, failed checks, location, status."""
        found = self.findings.divergence
        where = "-" if found is None else FaultSite(found.sublayer, found.layer).cell()
        failed = ", ".join(self.findings.failed) or "-"
        return [self.fault.name, self.fault.model, failed, where, self.status]

    def to_dict(self) -> JSONObject:
        """Return the outcome as plain data."""
        site, found = self.fault.site, self.findings.divergence
        metrics = self.logit_metrics
        return {
            "fault": self.fault.name,
            "kind": self.fault.kind,
            "model": self.fault.model,
            "failing": list(self.fault.failing),
            "failed": list(self.findings.failed),
            "site": None if site is None else str(site),
            "divergence": None if found is None else str(found),
            "logits": {
                name: metrics[name] for name in ("max", "relative", "threshold") if name in metrics
            },
            "status": self.status,
        }


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """The result of the self-test.

    Attributes:
        outcomes: one for each injected fault.
        clean_models: the number of models without a fault that were verified.
        false_reports: one line for each check that failed on one of these.
        seconds: the time that the self-test took.
    """

    outcomes: tuple[Outcome, ...]
    clean_models: int
    false_reports: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every fault is caught and located, and there is no false report."""
        return all(outcome.passed for outcome in self.outcomes) and not self.false_reports

    def summary(self) -> str:
        """Return a sentence with the counts."""
        passed = sum(outcome.passed for outcome in self.outcomes)
        return (
            f"{passed} of {len(self.outcomes)} injected faults caught and located; "
            f"{len(self.false_reports)} false reports on {self.clean_models} clean models."
        )

    def failures(self) -> str:
        """Return one line for each fault that was not caught and located, and each false report."""
        lines = [outcome.failure() for outcome in self.outcomes if not outcome.passed]
        return "\n".join([*lines, *self.false_reports])

    def to_dict(self) -> JSONObject:
        """Return the counts and every outcome, as plain data."""
        return {
            "passed": self.passed,
            "clean_models": self.clean_models,
            "false_reports": list(self.false_reports),
            "seconds": self.seconds,
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
        }
