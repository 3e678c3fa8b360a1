"""Losses and gradients of EXAONE 4.0 against Transformers, in fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.layouts import LAYOUTS, slow
from tests.helpers.training import assert_trains_like_transformers

MORE_LAYOUTS = slow(Layout(tp=2, pp=2, sp=True), Layout(tp=2, sp=True, cp=2))


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS], ids=str)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_adamw_steps_at_each_layout_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    """Every layout divides eight layers."""
    layers = {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
    folder = tiny(name, **({} if name == "exaone4" else layers))
    assert_trains_like_transformers(folder, layout)
