"""Packed sequences on the torch backend have the same logits as the same sequences alone."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.modules import attention
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.packing import max_packing_error_on_cpu

LENGTHS = [48, 16, 32]  # longer and shorter than the sliding window of the tiny hybrid model


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(cp=2), Layout(tp=2, sp=True, cp=2)], ids=str
)
@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_packed_sequences_equal_separate_ones(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    if name == "ernie45" and layout.tp > 1 and not layout.sp:
        pytest.skip("covered with sequence parallelism: the router's tokens are the same")
    assert max_packing_error_on_cpu(tiny(name), layout, LENGTHS) <= 1e-5


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=2)], ids=str)
def test_attention_across_packed_sequences_is_detected(
    megatron_bridge: Any, tiny: Any, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_sequence_bounds", lambda packed: [0, sum(LENGTHS)])
    assert max_packing_error_on_cpu(tiny("exaone4"), layout, LENGTHS) > 1e-2
