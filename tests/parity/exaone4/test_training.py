"""Gradients and AdamW steps of EXAONE 4.0 against Transformers, in fp32 on the CPU, at every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.training import assert_trains_alike

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, sp=True),
    Layout(cp=2),
    Layout(tp=2, sp=True, cp=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_gradients_and_five_steps_of_adamw(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    """Every parameter's gradient within 1e-4 (relative), every step's loss within 1e-4."""
    assert_trains_alike(tiny(name, **_eight_layers(name)), layout)


def _eight_layers(name: str) -> dict[str, Any]:
    """A layer count that every layout above divides."""
    return (
        {} if name == "exaone4" else {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
    )
