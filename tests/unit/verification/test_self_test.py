"""The fault bench: every planted fault is caught by the checks that must, and located; no clean model is reported."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from exaone_bridge.verification.report.report import Check, Divergence
from exaone_bridge.verification.self_test.run import FAULTS, SEEDS, Outcome, Result, self_test
from exaone_bridge.verification.self_test.upstream_criteria import UpstreamVerdict, upstream_verdict


def test_there_are_at_least_forty_faults_of_all_families() -> None:
    assert len(FAULTS) >= 40 and len({(fault.model, fault.name) for fault in FAULTS}) == len(FAULTS)
    assert {fault.model for fault in FAULTS} == {"exaone4", "exaone45", "ernie45"}
    assert {name for fault in FAULTS for name in fault.caught} == {
        *("tensors", "config", "files", "logits", "generation", "refused")
    }
    kinds = {fault.begins[1] for fault in FAULTS if fault.begins}
    vision_encoder = {"embedding", "norm", "attention", "mlp", "merger", "features"}
    assert kinds == {"embedding", "norm", "attention", "router", "mlp", "output layer"} | {
        f"vision {x}" for x in vision_encoder
    }


@pytest.mark.slow
def test_every_fault_is_caught_and_no_clean_model_is(
    megatron_bridge: Any, record_property: Any
) -> None:
    result = self_test()
    record_property("score", result.score())
    print(result.score(), f"{result.seconds:.0f} s")
    assert result.passed, result.faults()
    assert result.clean == 3 * SEEDS == 60 and len(result.outcomes) == len(FAULTS)
    assert sum(outcome.upstream.caught for outcome in result.outcomes) < len(FAULTS)


def test_the_bench_itself_can_fail(megatron_bridge: Any) -> None:
    """A fault that is none, one that is looked for in the wrong place, and one that another check must catch."""
    one = next(fault for fault in FAULTS if fault.name == "two experts swapped")
    faults = (
        dataclasses.replace(one, name="nothing", weights=lambda model: None),
        dataclasses.replace(one, name="elsewhere", begins=(1, "mlp")),
        dataclasses.replace(one, name="by another", caught=("files",)),
        one,
    )
    result = self_test(faults, seeds=0)
    assert [outcome.right for outcome in result.outcomes] == [
        False,
        False,
        False,
        True,
    ] and not result.passed
    assert [line.split(": ")[1] for line in result.faults().splitlines()] == [
        "nothing",
        "elsewhere",
        "by another",
    ]
    assert (
        "NOT CAUGHT" in result.outcomes[0].cells() and "2 mlp WRONG" in result.outcomes[1].cells()
    )
    assert result.score().startswith(
        "1 of 4 faults caught and located; 0 false reports on 0 clean models."
    )


def outcome(**more: Any) -> Outcome:
    check, where = Check("logits", "", False), Divergence("model.layers.1.mlp", 1, "mlp", ())
    return Outcome(
        "f", "m", ("logits",), (1, "mlp"), (check,), where, UpstreamVerdict(0.9, 0.0), **more
    )


def test_a_false_report_fails_the_bench() -> None:
    assert Result((outcome(),), 20, (), 1.0).passed
    found = Result((outcome(),), 20, ("exaone4, 3: logits: ...",), 1.0)
    assert (
        not found.passed and "exaone4, 3" in found.faults() and "1 false reports" in found.score()
    )


@pytest.mark.parametrize(
    ("last", "weight", "caught"),
    [
        (0.0, 0.0, False),
        (0.0, 0.0999, False),
        (0.0, 0.11, True),
        (3.0, 0.0, True),
        (float("nan"), 0.0, True),
    ],
)
def test_the_hosts_criteria(last: float, weight: float, caught: bool) -> None:
    logits = torch.ones(2, 5, 8)
    found = logits.clone()
    found[1, -1, 0] += last
    found[:, 0] -= 7  # no other position counts
    before = {"a": torch.zeros(3), "b": torch.ones(3)}
    verdict = upstream_verdict(
        logits, found, before, {"a": torch.full((3,), weight), "new": torch.ones(1)}
    )
    assert verdict.caught == caught and verdict.asked
    assert not UpstreamVerdict.nothing().asked and UpstreamVerdict.nothing().cells() == [
        "-",
        "-",
        "not asked",
    ]
