"""Gradients and AdamW steps of ERNIE 4.5 against Transformers, in fp32 on the CPU, at every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ernie45_cases import MOE_NAMES, NAMES
from training import relative_difference, train_megatron, train_transformers

from exaone_bridge.host.world import run_ranks
from exaone_bridge.parts.layout import Layout

LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2)]
EXPERT_LAYOUTS = [Layout(ep=2), Layout(tp=2, ep=2, sp=True), Layout(tp=2, ep=2, etp=1, sp=True), Layout(pp=2, ep=2)]
CASES = [(name, layout) for name in NAMES for layout in LAYOUTS] + [
    (name, layout) for name in MOE_NAMES for layout in EXPERT_LAYOUTS
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value))
def test_gradients_and_five_steps_of_adamw(host: Any, tiny: Any, name: str, layout: Layout) -> None:
    """Every parameter's gradient within 1e-4 (relative), every step's loss within 1e-4."""
    _compare(tiny(name), layout)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_with_biases(host: Any, tiny: Any, layout: Layout) -> None:
    _compare(tiny("ernie45", use_bias=True), layout)


def _compare(folder: Any, layout: Layout) -> None:
    tokens = torch.randint(387, (4, 41), generator=torch.Generator().manual_seed(1))
    ((losses, gradients),) = run_ranks(train_transformers, 1, folder, tokens, 5)
    results = run_ranks(train_megatron, layout.ranks, folder, layout, tokens, 5)
    last_stage = [result[0] for result in results if result[0][0] == result[0][0]]
    assert last_stage
    for ours in last_stage:
        assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) <= 1e-4
    assert losses[-1] < losses[0] - 0.01  # it learns: the comparison is not of standing still
    for result in results:
        extra = result[1].keys() - gradients.keys()
        assert gradients.keys() <= result[1].keys()
        assert all("e_score_correction_bias" in name or ".mtp_" in name for name in extra)  # neither is trained
        worst = max(gradients, key=lambda key: _difference(result[1][key], gradients[key]))
        assert _difference(result[1][worst], gradients[worst]) <= 1e-4, worst


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative; an expert that no token chose has no gradient on either side."""
    return found.abs().max().item() if not expected.any() else relative_difference(found, expected)
