"""Injected faults of EXAONE 4.5's vision encoder: prompts with images show each of them."""

from __future__ import annotations

from typing import Any

import pytest

import exaone_bridge
from exaone_bridge.verification.self_test.fault import Fault, changed_model
from tests.helpers.faults import Injections, assert_caught, assert_clean, fault_params

MODEL = "exaone45"


@pytest.mark.parametrize("fault", fault_params(MODEL))
def test_fault_is_caught_and_located(inject: Injections, fault: Fault) -> None:
    assert_caught(inject(fault))


def test_model_without_a_fault_passes(inject: Injections) -> None:
    assert_clean(inject.findings(MODEL))


def test_verify_runs_prompts_with_images(megatron_bridge: Any, tiny: Any) -> None:
    def narrow_windows(model: list[Any]) -> None:
        model[0].visual.window_size //= 3

    with changed_model(narrow_windows):
        report = exaone_bridge.verify(tiny(MODEL), quick=True)
    assert [check.name for check in report.checks if not check.passed] == ["logits"]
    assert report.divergence is not None and report.divergence.sublayer == "vision norm"
    assert report.divergence.name == "model.visual.blocks.0.norm1"
    assert "hidden states diverge at vision norm (" in report.failures()
