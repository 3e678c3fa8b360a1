"""Gradients and AdamW steps of EXAONE 4.0 against Transformers, in fp32 on the CPU, at every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import relative_difference, train_megatron, train_transformers

from exaone_bridge.host.world import run_ranks
from exaone_bridge.parts.layout import Layout

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, sp=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_gradients_and_five_steps_of_adamw(host: Any, tiny: Any, name: str, layout: Layout) -> None:
    """Every parameter's gradient within 1e-4 (relative), every step's loss within 1e-4."""
    folder = tiny(name, **_eight_layers(name))
    tokens = torch.randint(387, (4, 41), generator=torch.Generator().manual_seed(1))
    ((losses, gradients),) = run_ranks(train_transformers, 1, folder, tokens, 5)
    results = run_ranks(train_megatron, layout.ranks, folder, layout, tokens, 5)
    last_stage = [result[0] for result in results if result[0][0] == result[0][0]]
    assert last_stage
    for ours in last_stage:
        assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) <= 1e-4
    assert losses[-1] < losses[0] - 0.01  # it learns: the comparison is not of standing still
    for result in results:
        names = gradients.keys() - ({"lm_head.weight"} if "1.2b" in name else set())
        assert result[1].keys() == names
        worst = max(names, key=lambda key: relative_difference(result[1][key], gradients[key]))
        assert relative_difference(result[1][worst], gradients[worst]) <= 1e-4, worst


def _eight_layers(name: str) -> dict[str, Any]:
    """A layer count that every layout above divides."""
    return {} if name == "exaone4" else {"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}
