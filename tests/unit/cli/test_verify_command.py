"""`exaone-bridge verify`: two models, Megatron checkpoints, what it writes, and the fault bench."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

Cli = Callable[..., Any]


def statuses(path: Path) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(path.read_text())["checks"]}


def test_a_report_is_written_whatever_the_verdict(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny("exaone4"), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    outputs = [
        "--json",
        "r.json",
        "--report",
        "r.html",
        "--card",
        "r.md",
        "--name",
        "Model-X",
        "--note",
        "A copy.",
    ]
    run = cli("verify", tiny("exaone4"), "other", "--quick", *outputs)
    assert run.code == 1 and "hidden states diverge at layer 0, attention" in run.err
    data = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(
        data,
        json.loads((files("exaone_bridge.verification.report") / "report.schema.json").read_text()),
    )
    assert data["divergence"]["sublayer"] == "attention" and data["divergence"]["layer"] == 0
    assert data["command"].startswith("exaone-bridge verify ") and data["command"].endswith(
        "--note 'A copy.'"
    )
    assert statuses(tmp_path / "r.json") == {
        "tensors": "passed",
        "config": "failed",
        "files": "passed",
        "logits": "failed",
    }
    page = (tmp_path / "r.html").read_text()
    assert "sliding_window: 8, then 9" in page and "<svg " in page
    card = (tmp_path / "r.md").read_text()
    assert "# Model-X" in card and "A copy." in card and "| config | 1 of 24 keys differ" in card


def test_a_megatron_checkpoint_alone(
    megatron_bridge: Any, megatron_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    """Its own weights, loaded at another layout than it was written at."""
    run = cli("verify", megatron_folder, "--tp", 2, "--quick", "--json", "r.json")
    assert (run.code, run.err) == (0, "")
    assert statuses(tmp_path / "r.json") == dict.fromkeys(
        ("tensors", "config", "files", "logits"), "passed"
    )


def test_a_megatron_checkpoint_against_its_source(
    megatron_bridge: Any, sharded: Path, megatron_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("verify", sharded, megatron_folder, "--json", "r.json")
    assert (run.code, run.err) == (0, "")
    assert set(statuses(tmp_path / "r.json").values()) == {"passed"}
    assert (
        0
        < max(
            place["difference"]
            for place in json.loads((tmp_path / "r.json").read_text())["activations"]
        )
        < 1e-5
    )


def test_a_megatron_checkpoint_against_another_model(
    megatron_bridge: Any, tiny: Any, megatron_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("verify", tiny("exaone4", seed=1), megatron_folder, "--quick", "--json", "r.json")
    assert run.code == 1
    assert statuses(tmp_path / "r.json") == {
        "tensors": "failed",
        "config": "passed",
        "files": "passed",
        "logits": "failed",
    }
    assert json.loads((tmp_path / "r.json").read_text())["divergence"]["sublayer"] == "embedding"


@pytest.mark.parametrize("passed", [True, False])
def test_self_test_prints_a_line_for_each_fault(
    passed: bool,
    megatron_bridge: Any,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from exaone_bridge.verification.self_test import run as module

    names = ("one bit on disk flipped", "eos_token_id changed in config.json")
    faults = [fault for fault in module.FAULTS if fault.name in names]
    if not passed:
        faults[1] = dataclasses.replace(faults[0], name="no change", change=lambda folder: None)
    arguments = {"faults": faults, "seeds": 1, "models": ["exaone4"]}
    monkeypatch.setattr(module, "self_test", functools.partial(module.self_test, **arguments))
    result = cli("verify", "--self-test", "--json", "result.json")
    assert result.code == (0 if passed else 1)
    assert names[0] in result.out and ("NOT CAUGHT" in result.out) == (not passed)
    caught = 2 if passed else 1
    assert f"{caught} of 2 injected faults caught and located" in result.out
    assert "0 false reports on 1 clean models" in result.out
    data = json.loads((tmp_path / "result.json").read_text())
    assert data["passed"] == passed and data["clean_models"] == 1
    assert [outcome["status"] == "caught" for outcome in data["outcomes"]] == [True, passed]


@pytest.mark.slow
def test_quick_takes_less_than_a_minute_imports_included(tiny: Any) -> None:
    started = time.perf_counter()
    program = Path(sys.executable).with_name("exaone-bridge")
    done = subprocess.run(
        [program, "verify", tiny("exaone4"), "--quick"], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s")
    assert done.returncode == 0, done.stderr
    assert seconds < 60
