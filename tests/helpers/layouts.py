"""The parallel layouts that parity tests of every model run."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.schema.parallel_layout import Layout


def slow(*values: Any) -> list[Any]:
    """Return the values as parameters of `parametrize` that `make test` leaves out."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# The slow layouts use no kind of parallelism that another layout does not use.
LAYOUTS = [
    Layout(),
    Layout(tp=2, sp=True),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    *slow(Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)),
]
