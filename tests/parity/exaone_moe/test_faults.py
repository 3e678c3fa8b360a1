"""Injected faults of EXAONE MoE: each is caught by the checks that must fail, and located."""

from __future__ import annotations

import pytest

from exaone_bridge.verification.self_test.fault import Fault
from tests.helpers.faults import Injections, assert_caught, assert_clean, fault_params

MODEL = "exaone-moe"


@pytest.mark.parametrize("fault", fault_params(MODEL))
def test_fault_is_caught_and_located(inject: Injections, fault: Fault) -> None:
    assert_caught(inject(fault))


def test_model_without_a_fault_passes(inject: Injections) -> None:
    assert_clean(inject.findings(MODEL))
