"""`exaone-bridge verify`: exact conversions pass, faults fail their check, reports are written."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exaone_bridge.verification.report.report import Check, Report
from tests.helpers.cli import Cli, Run, Snapshot, names_in, read_config, read_tensors, table_rows
from tests.helpers.spelling import spell_as_published

CHECKS = ("tensors", "config", "files", "logits")


def printed_statuses(run: Run) -> dict[str, str]:
    """Return check -> status of the printed table."""
    return {row[0]: row[3] for row in table_rows(run.out)[1:]}


def statuses(report: Path) -> dict[str, str]:
    """Return check -> status of a JSON report."""
    return {check["name"]: check["status"] for check in json.loads(report.read_text())["checks"]}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", []),
        ("exaone4", ["--tp", 2, "--pp", 2, "--vpp", 2, "--sp"]),
        ("exaone4-1.2b", []),
        ("exaone4-1.2b", ["--tp", 2, "--pp", 3]),
    ],
    ids=str,
)
def test_verify_of_an_exact_conversion_passes(
    name: str,
    layout: list[object],
    megatron_bridge: Any,
    tiny: Any,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    before = snapshot(tiny(name))
    run = cli("verify", tiny(name), "--quick", *layout)
    assert (run.code, run.err) == (0, "")
    assert printed_statuses(run) == dict.fromkeys(CHECKS, "passed")
    metrics = {row[0]: row[1] for row in table_rows(run.out)}
    assert metrics["tensors"] == f"{len(read_tensors(tiny(name)))} tensors bitwise equal"
    assert metrics["files"] == "4 files equal" and "top-1 agreement 100.0%" in metrics["logits"]
    assert 0 < float(metrics["logits"].split()[2].rstrip(",")) < 2e-5
    assert snapshot(tiny(name)) == before and names_in(tmp_path / "tmp") == []


def test_verify_of_a_sharded_checkpoint_passes(
    megatron_bridge: Any, sharded: Path, cli: Cli
) -> None:
    assert cli("verify", sharded, "--quick").code == 0


def test_verify_of_the_working_directory_passes(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny("exaone4"), tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    assert cli("verify", ".", "--quick").code == 0


def test_verify_fails_on_a_window_off_by_one(
    megatron_bridge: Any, tiny: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.models.exaone4 import provider

    original = provider.megatron_window

    def one_more(windows: Any) -> Any:
        size, layers = original(windows)
        return (size[0] + 1, 0), layers

    monkeypatch.setattr(provider, "megatron_window", one_more)
    run = cli("verify", tiny("exaone4"), "--quick")
    assert run.code == 1
    statuses = printed_statuses(run)
    assert statuses["tensors"] == statuses["files"] == "passed" and statuses["logits"] == "FAILED"
    assert "exaone4: logits: max |difference| " in run.err
    assert "hidden states diverge at layer 0" in run.err


@pytest.mark.parametrize("layout", [[], ["--tp", 2, "--pp", 4]], ids=str)
@pytest.mark.usefixtures("layer_2_without_window")
def test_verify_names_the_first_layer_that_diverges(
    layout: list[object], megatron_bridge: Any, tiny: Any, cli: Cli
) -> None:
    run = cli("verify", tiny("exaone4"), *layout, "--quick", "--backend", "torch")
    assert run.code == 1
    assert printed_statuses(run) == dict.fromkeys(CHECKS, "passed") | {"logits": "FAILED"}
    assert run.err.startswith("exaone4: logits: ")
    assert "hidden states diverge at layer 2, attention" in run.err
    assert len(run.err.splitlines()) == 2 and "usual causes: RoPE" in run.err


@pytest.mark.usefixtures("layer_2_without_window")
def test_verify_finds_a_window_fault_only_in_longer_prompts(
    megatron_bridge: Any, tiny: Any, cli: Cli
) -> None:
    """The window has 8 tokens; the default length is longer."""
    assert cli("verify", tiny("exaone4"), "--quick", "--backend", "torch", "--length", 8).code == 0
    assert cli("verify", tiny("exaone4"), "--quick", "--backend", "torch", "--length", 9).code == 1


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"rms_norm_eps": 1e-5}))


EXPORT_FAULTS = {
    "tensors": (flip_a_bit, "1 of 91 tensors differ"),
    "config": (change_config, "rms_norm_eps: 0.0003, then 1e-05"),
    "files": (
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        "1 of 4 files differ; tokenizer_config.json",
    ),
}


@pytest.fixture
def fails_on(
    megatron_bridge: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, str, Callable[[Path], object], str], None]:
    """Return `fails_on(source, check, damage, message)`: verify with a damaged export."""
    from megatron.bridge import AutoBridge

    save = AutoBridge.save_hf_pretrained

    def check_failure(source: Path, check: str, damage: Any, message: str) -> None:
        def save_and_damage(bridge: Any, model: Any, path: Path, **options: Any) -> None:
            save(bridge, model, path, **options)
            damage(path)

        monkeypatch.setattr(AutoBridge, "save_hf_pretrained", save_and_damage)
        run = cli("verify", source, "--quick")
        assert run.code == 1 and run.err.startswith(f"exaone4: {check}: ") and message in run.err
        failed = [name for name, status in printed_statuses(run).items() if status == "FAILED"]
        assert failed == [check]

    return check_failure


@pytest.mark.parametrize("check", EXPORT_FAULTS)
def test_verify_fails_the_check_of_a_damaged_export(check: str, tiny: Any, fails_on: Any) -> None:
    fails_on(tiny("exaone4"), check, *EXPORT_FAULTS[check])


def test_verify_fails_on_a_config_in_another_spelling(
    tiny: Any, tmp_path: Path, fails_on: Any
) -> None:
    """Transformers reads both as one model; other programs know the source's keys only."""
    source = tmp_path / "exaone4"
    shutil.copytree(tiny("exaone4"), source)
    normalised = (source / "config.json").read_text()
    spell_as_published(source)
    fails_on(
        source,
        "config",
        lambda folder: (folder / "config.json").write_text(normalised),
        "torch_dtype: 'float32', then '(absent)'",
    )


def test_verify_of_two_models_writes_all_reports(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny("exaone4"), other)
    (other / "config.json").write_text(json.dumps(read_config(other) | {"sliding_window": 9}))
    outputs = ["--json", "r.json", "--report", "r.html", "--card", "r.md"]
    outputs += ["--name", "Model-X", "--note", "A copy."]
    run = cli("verify", tiny("exaone4"), "other", "--quick", *outputs)
    assert run.code == 1 and "hidden states diverge at layer 0, attention" in run.err
    data = json.loads((tmp_path / "r.json").read_text())
    schema = files("exaone_bridge.verification.report") / "report.schema.json"
    jsonschema.validate(data, json.loads(schema.read_text()))
    assert data["divergence"]["sublayer"] == "attention" and data["divergence"]["layer"] == 0
    assert data["command"].startswith("exaone-bridge verify ")
    assert data["command"].endswith("--note 'A copy.'")
    failed = {"config": "failed", "logits": "failed"}
    assert statuses(tmp_path / "r.json") == dict.fromkeys(CHECKS, "passed") | failed
    page = (tmp_path / "r.html").read_text()
    assert "sliding_window: 8, then 9" in page and "<svg " in page
    card = (tmp_path / "r.md").read_text()
    assert "# Model-X" in card and "A copy." in card and "| config | 1 of 24 keys differ" in card


def test_verify_of_a_megatron_checkpoint_passes_at_another_layout(
    megatron_bridge: Any, megatron_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("verify", megatron_folder, "--tp", 2, "--quick", "--json", "r.json")
    assert (run.code, run.err) == (0, "")
    assert statuses(tmp_path / "r.json") == dict.fromkeys(CHECKS, "passed")


def test_verify_of_a_megatron_checkpoint_and_its_source_passes(
    megatron_bridge: Any, sharded: Path, megatron_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("verify", sharded, megatron_folder, "--json", "r.json")
    assert (run.code, run.err) == (0, "")
    assert set(statuses(tmp_path / "r.json").values()) == {"passed"}
    activations = json.loads((tmp_path / "r.json").read_text())["activations"]
    assert 0 < max(activation["difference"] for activation in activations) < 1e-5


def test_verify_of_a_megatron_checkpoint_and_another_model_fails(
    megatron_bridge: Any, tiny: Any, megatron_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("verify", tiny("exaone4", seed=1), megatron_folder, "--quick", "--json", "r.json")
    assert run.code == 1
    failed = {"tensors": "failed", "logits": "failed"}
    assert statuses(tmp_path / "r.json") == dict.fromkeys(CHECKS, "passed") | failed
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


@pytest.fixture
def without_running(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `without_running(*checks)`: `verify` returns a report of these at once."""
    import exaone_bridge.verification as module

    def use(*checks: Check) -> None:
        report = Report("model", "TP1 x PP1", checks)
        monkeypatch.setattr(module, "verify", lambda *_, **__: report)

    return use


EQUAL = Check("tensors", "91 tensors bitwise equal", True)
DIFFERENT = Check("tensors", "1 tensor differs", False, "x differs")


def test_verify_prints_json_alone_on_standard_output(without_running: Any, cli: Cli) -> None:
    without_running(EQUAL)
    run = cli("verify", "model", "--json", "-")
    assert run.code == 0 and json.loads(run.out)["checks"][0]["name"] == "tensors"
    assert "91 tensors bitwise equal" in run.err
    assert "91 tensors bitwise equal" in cli("verify", "model").out


@pytest.mark.parametrize(("check", "code"), [(EQUAL, 2), (DIFFERENT, 1)])
def test_verdict_is_printed_although_a_report_cannot_be_written(
    check: Check, code: int, without_running: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    without_running(check)
    monkeypatch.setattr(Path, "write_text", full)
    run = cli("verify", "model", "--json", "report.json")
    assert run.code == code and check.summary in run.out
    assert "report.json: cannot be written (No space left on device)" in run.err
    assert check.passed or "x differs" in run.err


def _cpu_seconds(*command: str | Path) -> float:
    """Run a command and return the CPU time that it and its processes took."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


@pytest.mark.slow
def test_quick_verify_costs_little_more_than_its_imports(tiny: Any) -> None:
    """CPU time, as a ratio, because how long both wait depends on the machine's load."""
    imports = _cpu_seconds(sys.executable, "-c", "import exaone_bridge, megatron.bridge")
    program = Path(sys.executable).with_name("exaone-bridge")
    verify = _cpu_seconds(program, "verify", tiny("exaone4"), "--quick")
    print(f"imports {imports:.1f} s, verify {verify:.1f} s")
    assert verify < 2 * imports
