"""Short forms of reports, for assertions."""

from __future__ import annotations

from exaone_bridge.verification.report.report import Report


def statuses(report: Report) -> dict[str, str]:
    """The status of each check, by name."""
    return {check.name: check.status.value for check in report.checks}
