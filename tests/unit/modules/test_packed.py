"""Packed sequences on the torch backend: documents in one pack come out as they do alone."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.modules import attention
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.packing import worst_on_cpu

LENGTHS = [48, 16, 32]  # longer and shorter than the window of the hybrid miniature


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(cp=2), Layout(tp=2, sp=True, cp=2)], ids=str
)
@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_packed_documents_equal_the_same_alone(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    if name == "ernie45" and layout.tp > 1 and not layout.sp:
        pytest.skip("evaluated with sequence parallelism below: the router's tokens are the same")
    assert worst_on_cpu(tiny(name), layout, LENGTHS) <= 1e-5


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2)], ids=str)
def test_documents_that_see_each_other_are_caught(
    megatron_bridge: Any, tiny: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_starts", lambda packed: [0, sum(LENGTHS)])
    assert worst_on_cpu(tiny("exaone4"), layout, LENGTHS) > 1e-2
