"""Checks that a model passes through Megatron-Core unchanged."""

from __future__ import annotations

from pathlib import Path

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_files,
    compare_tensors,
)
from exaone_bridge.verification.report.report import Report
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.run import Session, run


def assert_passes(folder: Path, layout: Layout, options: VerifyOptions = VerifyOptions()) -> Report:
    """Check tensors, config and files bitwise, and all logits within 1e-4 of Transformers.

    Args:
        folder: a Hugging Face folder.
        layout: the parallel layout of the Megatron-Core model.
        options: further options of `verify`.

    Returns:
        The report of `verify`.
    """
    report = run(Session(source=folder, layout=layout, options=options))
    assert report.passed, report.failures()
    assert len(report.checks) == 4
    assert report.max_logit_difference <= 1e-4
    return report


def assert_same_folder(source: Path, exported: Path) -> None:
    """Check that an export has the tensors, the config and the files of its source."""
    checks = [
        compare_tensors(source, exported),
        compare_files(source, exported),
        compare_configs(read_json(source / "config.json"), read_json(exported / "config.json")),
    ]
    assert all(check.passed for check in checks), [check.details for check in checks]
