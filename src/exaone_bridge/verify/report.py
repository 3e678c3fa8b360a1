"""What a verification says: checks with a figure and a verdict each. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Check", "Report"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was checked, the figure that was found, whether it holds, and where it does not."""

    name: str
    figure: str
    holds: bool
    where: str = ""


@dataclass(slots=True)
class Report:
    """The checks of one source at one layout."""

    source: str
    parameters: int
    layout: str
    checks: list[Check] = field(default_factory=list)
    max_logit_difference: float = float("nan")
    first_differing_layer: str = "-"
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether every check holds, and there is at least one."""
        return bool(self.checks) and all(check.holds for check in self.checks)

    def faults(self) -> str:
        """One line for each check that does not hold."""
        return "\n".join(
            f"{self.source}: {check.name}: {check.figure}; {check.where}" for check in self.checks if not check.holds
        )

    @property
    def round_trip(self) -> bool:
        """Whether every check but that of the logits holds."""
        return all(check.holds for check in self.checks if check.name != "logits")
