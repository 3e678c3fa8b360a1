"""Injected faults of EXAONE MoE: each is caught by the checks that must fail, and located."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.checkpoint.reshard.plan import LocalParam, Rank, ReshardPlan
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.self_test.fault import Fault, changed_model
from exaone_bridge.verification.workflow.run import Session, run
from tests.helpers.faults import Injections, assert_caught, assert_clean, fault_params

MODEL = "exaone-moe"


@pytest.mark.parametrize("fault", fault_params(MODEL))
def test_fault_is_caught_and_located(inject: Injections, fault: Fault) -> None:
    assert_caught(inject(fault))


def test_model_without_a_fault_passes(inject: Injections) -> None:
    assert_clean(inject.findings(MODEL))


# --- faults that one rank cannot have -------------------------------------------------------------


def _exchange_experts(model: Any) -> None:
    """Give each of two EP ranks the experts of the other."""
    from megatron.core import parallel_state

    group = parallel_state.get_expert_model_parallel_group()
    for name, parameter in model[0].named_parameters():
        if "local_experts" in name:
            both = [torch.empty_like(parameter) for _ in range(2)]
            torch.distributed.all_gather(both, parameter.detach(), group)
            parameter.copy_(both[1 - group.rank()])


def _interleaved_plan() -> contextlib.AbstractContextManager[object]:
    """Load and save expert e on EP rank e % ep, as if it were e // (E / ep)."""
    original = ReshardPlan.local_params

    def local_params(plan: ReshardPlan, rank: Rank) -> Iterator[LocalParam]:
        number, ep = sum(map(len, plan.experts)), plan.layout.ep
        experts = tuple(tuple(range(each, number, ep)) for each in range(ep))
        return original(dataclasses.replace(plan, experts=experts), rank)

    return mock.patch.object(ReshardPlan, "local_params", local_params)


EP_FAULTS: dict[
    str, tuple[Callable[[], contextlib.AbstractContextManager[object]], tuple[str, ...]]
] = {
    "experts exchanged after loading": (
        lambda: changed_model(_exchange_experts),
        ("tensors", "logits"),
    ),
    "experts interleaved by load and save": (_interleaved_plan, ("logits",)),
}


@pytest.mark.parametrize("fault", EP_FAULTS)
def test_experts_on_another_ep_rank_are_located(
    megatron_bridge: Any, tiny: Any, fault: str
) -> None:
    injected, failing = EP_FAULTS[fault]
    with injected():
        report = run(Session(source=tiny(MODEL), layout=Layout(ep=2)))
    assert tuple(check.name for check in report.checks if not check.passed) == failing
    assert report.divergence is not None
    assert (report.divergence.layer, report.divergence.sublayer) == (1, "mlp")
