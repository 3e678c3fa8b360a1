"""`exaone-bridge demo`: one table for all tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.models import FAMILIES
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone_moe import EXAONE_MOE
from tests.helpers.cli import Cli, names_in, table_rows

COLUMNS = ["model", "parameters", "layout", "max |logit difference|"]
COLUMNS += ["first differing layer", "round trip", "seconds"]
MOE = ("ernie45", "ernie45-300b", *EXAONE_MOE.tiny)


def test_demo_prints_one_table(megatron_bridge: Any, cli: Cli, tmp_path: Path) -> None:
    run = cli("demo")
    assert (run.code, run.err) == (0, "")
    head, *models = table_rows(run.out)
    assert head == COLUMNS and run.out.count("┏") == 1
    assert [row[0] for row in models] == [name for family in FAMILIES for name in family.tiny]
    assert all(row[2].startswith("TP2 x PP2") for row in models)
    assert {("EP2" in row[2]) for row in models if row[0] in MOE} == {True}
    assert {tuple(row[4:6]) for row in models} == {("-", "bitwise equal")}
    assert all(0 < float(row[3]) < 2e-5 for row in models if row[0] != "exaone-moe-2")
    assert all(float(row[6]) > 0 for row in models)
    assert [int(row[1].replace(",", "")) for row in models][:2] == [345_920, 247_072]
    assert {row[0]: row[3] for row in models}["exaone-moe-2"] == "not run"
    assert "exaone-moe-2: logits were not compared: Transformers ignores sliding_windows" in run.out
    assert names_in(tmp_path / "tmp") == [] and names_in(tmp_path) == ["tmp"]


@pytest.mark.usefixtures("layer_2_without_window")
def test_demo_fails_if_one_model_diverges(
    megatron_bridge: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exaone_bridge.cli.demo.TINY_CONFIGS", EXAONE4.tiny)
    run = cli("demo", "--tp", 1, "--pp", 1, "--backend", "torch")
    assert run.code == 1
    rows = {row[0]: row for row in table_rows(run.out)}
    assert rows["exaone4"][4:6] == ["2", "bitwise equal"] and float(rows["exaone4"][3]) > 1e-3
    assert rows["exaone4-1.2b"][4:6] == ["-", "bitwise equal"]
    assert "exaone4: logits: " in run.err and "layer 2" in run.err and "exaone4-1.2b" not in run.err
    assert names_in(tmp_path / "tmp") == []


@pytest.mark.slow
def test_demo_repeats_the_layer_pattern_if_the_layout_needs_more_layers(
    megatron_bridge: Any, cli: Cli
) -> None:
    run = cli("demo", "--tp", 1, "--pp", 3, "--vpp", 3, "--ep", 1)
    assert run.code == 0
    rows = {row[0]: row for row in table_rows(run.out)}
    assert [rows[name][2] for name in EXAONE4.tiny] == ["TP1 x PP3 x VPP3"] * 2
    assert int(rows["exaone4"][1].replace(",", "")) > 345_920  # nine layers
    assert [rows[name][5] for name in EXAONE_MOE.tiny] == ["bitwise equal"] * 2
