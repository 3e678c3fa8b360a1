"""A model that must come through Megatron-Core as it is."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.report.report import Report
from exaone_bridge.verification.workflow.job import VerifyOptions
from exaone_bridge.verification.workflow.verify import verify


def assert_passes(folder: Path, layout: Layout, asked: VerifyOptions = VerifyOptions()) -> Report:
    """Tensors, configuration and files bitwise, and every position's logits within 1e-4 of Transformers'."""
    report = verify(folder, layout, asked)
    assert report.passed, report.failures()
    assert len(report.checks) == 4
    assert report.max_logit_difference <= 1e-4
    return report
