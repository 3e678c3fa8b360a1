"""The self-test of the verification; `tests/parity/*/test_faults.py` test the faults themselves."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.verification.report.report import Check, Divergence
from exaone_bridge.verification.self_test.fault import (
    Fault,
    FaultSite,
    WeightFault,
)
from exaone_bridge.verification.self_test.outcome import Findings, Outcome, SelfTestResult
from exaone_bridge.verification.self_test.registry import (
    FAULTS,
    MODELS,
    fault_table,
    faults_of,
    representative_faults,
)
from exaone_bridge.verification.self_test.run import SEEDS, run_model, self_test
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


# --- the list -------------------------------------------------------------------------------------


def test_names_are_unique_for_a_model() -> None:
    for model in MODELS:
        names = [fault.name for fault in faults_of(model)]
        assert len(set(names)) == len(names)


def test_list_covers_every_check_and_sublayer() -> None:
    assert set(MODELS) >= {"exaone4", "exaone45", "ernie45", "exaone-moe"}
    assert {name for fault in FAULTS for name in fault.failing} == {
        *("tensors", "config", "files", "logits", "generation", "rejected")
    }
    language = {"embedding", "norm", "attention", "router", "mlp", "output layer"}
    vision = {"embedding", "norm", "attention", "mlp", "merger", "features"}
    sublayers = {fault.site.sublayer for fault in FAULTS if fault.site is not None}
    assert sublayers == language | {f"vision {sublayer}" for sublayer in vision}


def test_representative_faults_are_one_for_each_kind_and_model() -> None:
    chosen = [(fault.model, fault.kind) for fault in representative_faults()]
    assert sorted(chosen) == sorted({(fault.model, fault.kind) for fault in FAULTS})
    assert len(chosen) == 15


# --- the documentation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "number"),
    [("injected faults", len(FAULTS)), ("clean models", SEEDS * len(MODELS))],
)
def test_documented_numbers_are_those_of_the_self_test(what: str, number: int) -> None:
    found = {
        str(page.relative_to(ROOT)): set(re.findall(rf"(\d+) {what}", page.read_text()))
        for page in PAGES
    }
    stated = {page: numbers for page, numbers in found.items() if numbers}
    assert stated and all(numbers == {str(number)} for numbers in stated.values()), stated


def test_documented_table_is_the_list() -> None:
    (page,) = (page for page in PAGES if "<!-- injected faults: begin" in page.read_text())
    table = re.search(
        r"<!-- injected faults: begin.*?-->\n+(.*?)\n*<!-- injected faults: end -->",
        page.read_text(),
        re.DOTALL,
    )
    assert table is not None and table[1] == fault_table().rstrip("\n"), (
        "run `python -m exaone_bridge.verification.self_test` and paste its output"
    )


# --- outcomes -------------------------------------------------------------------------------------

FAULT = WeightFault(
    name="a fault",
    model="exaone4",
    failing=("tensors", "logits"),
    site=FaultSite("mlp", 1, "model.layers.1.mlp"),
    change=lambda model: None,
)
DIVERGENCE = Divergence("model.layers.1.mlp", 1, "mlp", ())


def _outcome(
    failed: tuple[str, ...], divergence: Divergence | None, fault: Fault = FAULT
) -> Outcome:
    names = ("tensors", "config", "logits")
    checks = tuple(Check(name, "", name not in failed) for name in names)
    return Outcome(fault, Findings(checks, divergence))


@pytest.mark.parametrize(
    ("failed", "divergence", "caught", "located"),
    [
        (("tensors", "logits"), DIVERGENCE, True, True),
        (("logits",), DIVERGENCE, False, True),
        (("tensors", "config", "logits"), DIVERGENCE, False, True),
        (("tensors", "logits"), None, True, False),
        (("tensors", "logits"), dataclasses.replace(DIVERGENCE, layer=2), True, False),
        (("tensors", "logits"), dataclasses.replace(DIVERGENCE, sublayer="norm"), True, False),
        (("tensors", "logits"), dataclasses.replace(DIVERGENCE, name="model.norm"), True, False),
    ],
)
def test_outcome(
    failed: tuple[str, ...], divergence: Divergence | None, caught: bool, located: bool
) -> None:
    outcome = _outcome(failed, divergence)
    assert (outcome.is_caught, outcome.is_located) == (caught, located)
    assert outcome.passed == (caught and located)
    status = "caught" if outcome.passed else "WRONG LOCATION" if caught else "NOT CAUGHT"
    assert outcome.cells()[-1] == outcome.to_dict()["status"] == status


def test_outcome_of_a_fault_that_changes_no_activation() -> None:
    fault = dataclasses.replace(FAULT, failing=("tensors",), site=None)
    assert _outcome(("tensors",), None, fault).passed
    assert not _outcome(("tensors",), DIVERGENCE, fault).passed


def test_false_report_fails_the_self_test() -> None:
    outcome = _outcome(("tensors", "logits"), DIVERGENCE)
    assert SelfTestResult((outcome,), 20, (), 1.0).passed
    result = SelfTestResult((outcome,), 20, ("exaone4, seed 3: logits: ...",), 1.0)
    assert not result.passed
    assert "exaone4, seed 3" in result.failures() and "1 false reports" in result.summary()


# --- runs -----------------------------------------------------------------------------------------


def test_self_test_can_fail(megatron_bridge: Any, tmp_path: Path) -> None:
    """One fault changes nothing, one is expected elsewhere, one to fail another check."""
    named = (fault for fault in FAULTS if fault.name == "two experts swapped")
    (fault,) = (fault for fault in named if fault.model == "ernie45")
    assert isinstance(fault, WeightFault)
    faults = (
        dataclasses.replace(fault, name="no change", change=lambda model: None),
        dataclasses.replace(fault, name="elsewhere", site=FaultSite("mlp", 1)),
        dataclasses.replace(fault, name="another check", failing=("files",)),
        fault,
    )
    result = self_test(faults, seeds=1, models=("ernie45",))
    assert [outcome.passed for outcome in result.outcomes] == [False, False, False, True]
    assert not result.passed and result.clean_models == 1
    assert [line.split(": ")[1] for line in result.failures().splitlines()] == [
        *("no change", "elsewhere", "another check")
    ]
    assert result.summary().startswith(
        "1 of 4 injected faults caught and located; 0 false reports on 1 clean models."
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_clean_models_have_no_false_reports(
    megatron_bridge: Any, tmp_path: Path, model: str
) -> None:
    assert ForkLauncher().first(run_model, tmp_path, model, (), range(SEEDS)) == ([], [])
