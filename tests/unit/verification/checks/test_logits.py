"""The check of logits, in fp32 and in half precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.compare import compare_activations
from exaone_bridge.verification.checks.logits import compare_half_precision, compare_logits
from exaone_bridge.verification.report.report import Check
from tests.helpers.reference import Reference


def check(
    reference: Reference, compared: Activations, activations: Activations | None = None
) -> Check:
    expected = reference.activations if activations is None else activations
    differences = compare_activations(
        reference.points, [expected], [compared], reference.model_config
    )
    return compare_logits([expected], [compared], differences)


def test_equal_logits_pass(reference: Reference) -> None:
    found = check(reference, reference.copy())
    assert found.passed and found.metrics["max"] == 0 and found.metrics["top1"] == 1
    assert found.metrics["tokens"] == 42


@pytest.mark.parametrize("at", [(0, 0), (1, 20), (1, 7)])
def test_one_logit_beyond_rounding_fails(at: tuple[int, int], reference: Reference) -> None:
    compared = reference.copy()
    compared.logits[*at, 3] += 1e-3 * compared.logits[at].abs().max()
    assert not check(reference, compared).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_fail(value: float, reference: Reference) -> None:
    compared = reference.copy()
    compared.logits[1, 2, 3] = value
    assert not check(reference, compared).passed


def test_activations_alone_do_not_fail_the_logits(reference: Reference) -> None:
    compared = reference.copy()
    compared.values["model.layers.5.mlp"] += 1
    assert check(reference, compared).passed


def test_the_metrics_are_those_of_every_token(reference: Reference) -> None:
    compared = reference.copy()
    token = compared.logits[0, 3].argmax()
    compared.logits[0, 3, token] -= 100
    found = check(reference, compared)
    assert not found.passed
    assert found.metrics["max"] == pytest.approx(100, rel=1e-4)
    assert found.metrics["mean"] == pytest.approx(100 / compared.logits.numel(), rel=1e-3)
    assert found.metrics["top1"] == pytest.approx(41 / 42)
    expected = reference.activations.logits[0, 3].double().log_softmax(-1)
    kl = (expected.exp() * (expected - compared.logits[0, 3].double().log_softmax(-1))).sum()
    assert found.metrics["kl_max"] == pytest.approx(kl.item(), rel=1e-6)
    assert found.metrics["kl_mean"] == pytest.approx(kl.item() / 42, rel=1e-6)


def test_tokens_after_a_router_tie_do_not_count(reference: Reference) -> None:
    stable = torch.ones(2, 21, dtype=torch.bool)
    stable[1, 5:] = False
    tied = dataclasses.replace(reference.activations, stable=stable)
    compared = reference.copy()
    compared.logits[1, 5] += 1
    found = check(reference, compared, tied)
    assert found.passed and found.metrics["tokens"] == 26 and found.metrics["skipped"] == 16
    assert "16 after a router tie left out" in found.summary
    compared.logits[1, 4] += 1
    assert not check(reference, compared, tied).passed


def test_no_stable_token_fails(reference: Reference) -> None:
    none = dataclasses.replace(reference.activations, stable=torch.zeros(2, 21, dtype=torch.bool))
    assert not check(reference, reference.copy(), none).passed


@pytest.mark.parametrize(
    ("distance", "passed"),
    [(0.5, True), (1.0, True), (1.08, True), (1.13, False), (3.0, False), (float("nan"), False)],
)
def test_half_precision_may_be_as_far_as_transformers_and_a_tenth(
    distance: float, passed: bool, reference: Reference
) -> None:
    logits = reference.activations.logits

    def at_distance(by: float) -> Activations:
        generator = torch.Generator().manual_seed(int(by * 1000))
        return Activations(logits + by * torch.randn(logits.shape, generator=generator))

    compared = at_distance(distance) if distance == distance else Activations(logits * float("nan"))
    own = at_distance(1.0)
    found = compare_half_precision([reference.activations], [own], [compared], "bfloat16")
    assert found.passed == passed
