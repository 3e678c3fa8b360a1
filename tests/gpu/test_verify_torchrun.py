"""`torchrun -m exaone_bridge verify` on two GPUs, NCCL and Transformer Engine.

Three runs of torchrun start together: the command; the command with an injected fault; and a driver
whose two processes run the command once per case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gpu import wide

DRIVER = Path(__file__).with_name("verify_driver.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NAMES = ["exaone4", "ernie45", "exaone45"]
CHECKS = {"tensors", "config", "files", "logits", "generation"}
CP2 = ("--cp", "2", "--dtype", "bfloat16")


def _cases() -> list[dict[str, Any]]:
    """Return model, options, and the expected status of each check that does not pass.

    The key "megatron" verifies the model's Megatron checkpoint.
    """
    cases: list[dict[str, Any]] = []
    for name in NAMES:
        cases.append({"name": name, "options": ("--tp", "2")})
        cases.append({"name": name, "options": CP2})
    cases.append({"name": "exaone4", "options": ("--tp", "2", "--sp", "--gradients", "--quick")})
    cases.append(
        {
            "name": "exaone4",
            "options": ("--pp", "2", "--stream"),
            "statuses": {"generation": "not run"},
        }
    )
    cases.append({"name": "ernie45", "options": ("--ep", "2", "--quick")})
    failed = {"tensors": "failed", "logits": "failed"}
    cases.append(
        {
            "name": "exaone4",
            "options": (*CP2, "--quick"),
            "fault": "one-projection",
            "statuses": failed,
            "code": 1,
        }
    )
    cases.append({"name": "exaone4", "options": ("--tp", "2"), "megatron": True})
    cases.append(
        {"name": "exaone4", "options": ("--pp", "4"), "code": 2, "message": "--nproc_per_node 4"}
    )
    for case in cases:
        marks = [case.get("fault", ""), "from Megatron" if "megatron" in case else ""]
        case["id"] = " ".join([case["name"], *case["options"], *filter(None, marks)])
    return cases


CASES = _cases()


def prepared(work: Path, tiny: Any) -> tuple[Path, Path]:
    """Return the folder of `cases.json` and of all that it names, and the tiny EXAONE 4.0."""
    folders = {name: tiny(name, **wide(name)) for name in NAMES}
    megatron = work / "megatron"
    command = [sys.executable, "-m", "exaone_bridge", "import", folders["exaone4"], megatron]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    written = []
    for number, case in enumerate(CASES):
        model = megatron if "megatron" in case else folders[case["name"]]
        arguments = ["verify", str(model), *case["options"], "--json", str(work / f"{number}.json")]
        written.append({"id": case["id"], "fault": case.get("fault"), "arguments": arguments})
    (work / "cases.json").write_text(json.dumps(written))
    return work, folders["exaone4"]


def commands(work: Path, source: Path) -> dict[str, list[str]]:
    """Return the command of each run of torchrun, by name."""

    def verifying(name: str) -> list[str]:
        return ["verify", str(source), "--tp", "2", "--json", str(work / f"{name}.json")]

    return {
        "clean": [*TORCHRUN, "-m", "exaone_bridge", *verifying("clean")],
        "fault": [*TORCHRUN, str(DRIVER), "one-weight", *verifying("fault")],
        "cases": [*TORCHRUN, str(DRIVER), str(work)],
    }


@pytest.fixture(scope="module")
def work(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all commands; return the folder with NAME.code, NAME.out, NAME.err and the reports."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder, source = prepared(tmp_path_factory.mktemp("verify"), tiny)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment.pop("NVIDIA_TF32_OVERRIDE", None)  # the command sets it
    started = {}
    for name, command in commands(folder, source).items():
        with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
            started[name] = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    for name, process in started.items():
        try:
            code: int | str = process.wait(timeout=400)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "took too long"
        (folder / f"{name}.code").write_text(str(code))
    return folder


def _output(work: Path, name: str) -> str:
    return "\n".join(
        (work / f"{name}.{stream}").read_text(errors="replace")[-4000:] for stream in ("out", "err")
    )


def _statuses(report: Path) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(report.read_text())["checks"]}


def test_clean_model_passes_and_one_rank_prints(work: Path) -> None:
    assert (work / "clean.code").read_text() == "0", _output(work, "clean")
    assert _statuses(work / "clean.json") == dict.fromkeys(CHECKS, "passed")
    printed = (work / "clean.out").read_text()
    print(printed)
    assert printed.count("threshold") == 1 and printed.count("importing Megatron-Core") == 1
    assert "initializing..." not in printed


def test_injected_fault_on_one_rank_is_located(work: Path) -> None:
    """One weight of one linear layer of the second rank is wrong; the report is complete."""
    assert (work / "fault.code").read_text() == "1", _output(work, "fault")
    expected = dict.fromkeys(CHECKS, "passed") | {"tensors": "failed", "logits": "failed"}
    report = json.loads((work / "fault.json").read_text())
    assert _statuses(work / "fault.json") in (expected, expected | {"generation": "failed"})
    assert (report["divergence"]["layer"], report["divergence"]["sublayer"]) == (2, "attention")
    errors = (work / "fault.err").read_text()
    assert errors.count("hidden states diverge at layer 2, attention") == 1, _output(work, "fault")


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number]["id"])
def test_case_has_the_expected_exit_code_and_statuses(work: Path, number: int) -> None:
    case = CASES[number]
    results = (
        json.loads((work / "results.json").read_text()) if (work / "results.json").is_file() else {}
    )
    assert case["id"] in results, _output(work, "cases")
    first, second = results[case["id"]]
    assert first["code"] == second["code"] == case.get("code", 0), (first, second)
    assert second["out"] == ""
    if message := case.get("message"):
        assert message in first["err"] and message not in second["err"]
        return
    report = json.loads((work / f"{number}.json").read_text())
    checks = CHECKS - {"generation"} if "--quick" in case["options"] else CHECKS
    checks = checks | ({"gradients"} if "--gradients" in case["options"] else set())
    expected = dict.fromkeys(checks, "passed") | case.get("statuses", {})
    assert _statuses(work / f"{number}.json") == expected
    logits = next(check for check in report["checks"] if check["name"] == "logits")
    print(
        case["id"],
        f"{report['seconds']:.1f} s:",
        logits["summary"],
        "; threshold",
        logits["threshold"],
    )


def test_driver_of_all_cases_exits_with_0(work: Path) -> None:
    assert (work / "cases.code").read_text() == "0", _output(work, "cases")
