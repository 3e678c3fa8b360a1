"""Tests of engines run only where they are asked for, because they compile and download engines."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of this folder, unless the command's `-m` names their marker."""
    if "engine" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="`make test-engines` runs it")
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(skip)
