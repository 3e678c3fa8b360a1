"""All injected faults, in one list: `verify --self-test` and the tests inject these."""

from __future__ import annotations

from exaone_bridge.verification.self_test.ernie45_faults import ERNIE45_FAULTS
from exaone_bridge.verification.self_test.exaone4_faults import EXAONE4_FAULTS
from exaone_bridge.verification.self_test.exaone45_faults import EXAONE45_FAULTS
from exaone_bridge.verification.self_test.exaone_moe_faults import EXAONE_MOE_FAULTS
from exaone_bridge.verification.self_test.fault import Fault
from exaone_bridge.verification.self_test.folder_faults import FOLDER_FAULTS

__all__ = ["FAULTS", "MODELS", "fault_table", "faults_of", "representative_faults"]

FAULTS: tuple[Fault, ...] = (
    *EXAONE4_FAULTS,
    *EXAONE45_FAULTS,
    *ERNIE45_FAULTS,
    *EXAONE_MOE_FAULTS,
    *FOLDER_FAULTS,
)
MODELS: tuple[str, ...] = tuple(dict.fromkeys(fault.model for fault in FAULTS))
"""The tiny models into which faults are injected."""


def faults_of(model: str) -> tuple[Fault, ...]:
    """Return the faults of one tiny model, in the order of the list."""
    return tuple(fault for fault in FAULTS if fault.model == model)


def representative_faults() -> tuple[Fault, ...]:
    """Return the first fault of each tiny model and kind."""
    found: dict[tuple[str, str], Fault] = {}
    for fault in FAULTS:
        found.setdefault((fault.model, fault.kind), fault)
    return tuple(found.values())


def fault_table() -> str:
    """Return the list as a Markdown table, which docs/verification.md contains."""
    lines = [
        "| injected fault | kind | tiny model | checks that fail | layer, sublayer |",
        "|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        cells = (
            fault.name,
            fault.kind,
            fault.model,
            ", ".join(fault.failing),
            "-" if fault.site is None else fault.site.cell(),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
