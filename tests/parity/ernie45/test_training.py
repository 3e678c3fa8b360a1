"""Losses and gradients of ERNIE 4.5 against Transformers, in fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.layouts import LAYOUTS, slow
from tests.helpers.training import assert_trains_like_transformers

# Megatron-Core trains experts over TP with sequence parallelism only.
MOE_LAYOUTS = [
    Layout(),
    Layout(tp=2, sp=True),
    Layout(cp=2),
    Layout(tp=2, ep=2, sp=True),
    Layout(pp=2, vpp=2, ep=2),
    *slow(Layout(pp=2), Layout(pp=2, vpp=2), Layout(ep=2), Layout(pp=2, ep=2)),
    *slow(Layout(tp=2, ep=2, etp=1, sp=True), Layout(cp=2, ep=2)),
]
UNTRAINED = ("e_score_correction_bias", ".mtp_")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adamw_steps_of_the_dense_model_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    assert_trains_like_transformers(tiny("ernie45-dense"), layout, UNTRAINED)


@pytest.mark.parametrize("layout", MOE_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["ernie45", "ernie45-300b"])
def test_adamw_steps_of_moe_models_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    assert_trains_like_transformers(tiny(name), layout, UNTRAINED)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_adamw_steps_with_biases_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    assert_trains_like_transformers(tiny("ernie45", use_bias=True), layout, UNTRAINED)
