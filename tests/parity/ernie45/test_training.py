"""Gradients and AdamW steps of ERNIE 4.5 against Transformers, in fp32 on the CPU, at every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.ernie45_cases import MOE_NAMES, NAMES
from tests.helpers.training import assert_trains_alike

LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2)]
EXPERT_LAYOUTS = [
    Layout(ep=2),
    Layout(tp=2, ep=2, sp=True),
    Layout(tp=2, ep=2, etp=1, sp=True),
    Layout(pp=2, ep=2),
    Layout(cp=2, ep=2),
]
UNTRAINED = ("e_score_correction_bias", ".mtp_")
CASES = [(name, layout) for name in NAMES for layout in LAYOUTS] + [
    (name, layout) for name in MOE_NAMES for layout in EXPERT_LAYOUTS
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value))
def test_gradients_and_five_steps_of_adamw(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    """Every parameter's gradient within 1e-4 (relative), every step's loss within 1e-4."""
    assert_trains_alike(tiny(name), layout, UNTRAINED)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_with_biases(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    assert_trains_alike(tiny("ernie45", use_bias=True), layout, UNTRAINED)
