"""Fixtures of the parity tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.faults import Injections


@pytest.fixture(scope="module")
def inject(megatron_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Injections]:
    """`inject(fault)` returns an outcome; `inject.findings(model)` verifies without a fault."""
    injections = Injections(tmp_path_factory.mktemp("faults"))
    yield injections
    injections.close()
