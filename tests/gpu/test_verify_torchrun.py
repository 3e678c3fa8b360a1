"""`torchrun -m exaone_bridge verify` on two GPUs, NCCL and Transformer Engine: each check's status, exit codes, faults.

Three starts of torchrun, all at once: the command itself; the command with one weight altered; and one whose processes
run the command once for each of the other cases.
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

DRIVER = Path(__file__).with_name("verify_driver.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NAMES = ["exaone4", "ernie45", "exaone45"]
CHECKS = {"tensors", "config", "files", "logits", "generation"}
CP2 = ("--cp", "2", "--dtype", "bfloat16")


def _cases() -> list[dict[str, Any]]:
    """Name, options, and what must be said: the status of each check that does not pass.

    Also whether the model is verified as a Megatron checkpoint.
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
    differs = {"tensors": "failed", "logits": "failed"}
    cases.append(
        {
            "name": "exaone4",
            "options": (*CP2, "--quick"),
            "fault": "one-projection",
            "statuses": differs,
            "code": 1,
        }
    )
    cases.append({"name": "exaone4", "options": ("--tp", "2"), "megatron": True})
    cases.append(
        {"name": "exaone4", "options": ("--pp", "4"), "code": 2, "says": "--nproc_per_node 4"}
    )
    for case in cases:
        marks = [case.get("fault", ""), "from Megatron" if "megatron" in case else ""]
        case["id"] = " ".join([case["name"], *case["options"], *filter(None, marks)])
    return cases


CASES = _cases()


def prepared(work: Path, tiny: Any) -> tuple[Path, Path]:
    """A folder with `cases.json` and all it names, and the folder of the exaone4 that the other starts verify."""
    from tests.gpu.test_exaone45 import wide45
    from tests.gpu.test_transformer_engine import wide

    folders = {
        name: tiny(name, **(wide45() if name == "exaone45" else wide(name))) for name in NAMES
    }
    megatron = work / "megatron"
    importing = [
        sys.executable,
        "-m",
        "exaone_bridge",
        "import",
        str(folders["exaone4"]),
        str(megatron),
    ]
    subprocess.run(importing, check=True, stdout=subprocess.DEVNULL)
    written = []
    for number, case in enumerate(CASES):
        model = megatron if "megatron" in case else folders[case["name"]]
        arguments = ["verify", str(model), *case["options"], "--json", str(work / f"{number}.json")]
        written.append({"id": case["id"], "fault": case.get("fault"), "arguments": arguments})
    (work / "cases.json").write_text(json.dumps(written))
    return work, folders["exaone4"]


def commands(work: Path, source: Path) -> dict[str, list[str]]:
    """Each start of torchrun, by name."""

    def verifying(name: str) -> list[str]:
        return ["verify", str(source), "--tp", "2", "--json", str(work / f"{name}.json")]

    return {
        "right": [*TORCHRUN, "-m", "exaone_bridge", *verifying("right")],
        "fault": [*TORCHRUN, str(DRIVER), "one-weight", *verifying("fault")],
        "cases": [*TORCHRUN, str(DRIVER), str(work)],
    }


@pytest.fixture(scope="module")
def work(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what each start wrote: NAME.code, NAME.out, NAME.err; reports; results.json."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder, source = prepared(tmp_path_factory.mktemp("verify"), tiny)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment.pop("NVIDIA_TF32_OVERRIDE", None)  # which is the command's own business
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


def _said(work: Path, name: str) -> str:
    return "\n".join(
        (work / f"{name}.{stream}").read_text(errors="replace")[-4000:] for stream in ("out", "err")
    )


def _statuses(report: Path) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(report.read_text())["checks"]}


def test_the_command_holds(work: Path) -> None:
    """Exit code 0; the first rank alone prints, one table."""
    assert (work / "right.code").read_text() == "0", _said(work, "right")
    assert _statuses(work / "right.json") == dict.fromkeys(CHECKS, "passed")
    printed = (work / "right.out").read_text()
    print(printed)
    assert printed.count("threshold") == 1 and printed.count("importing Megatron-Core") == 1
    assert "initializing..." not in printed


def test_one_weight_altered(work: Path) -> None:
    """On the second rank, one number of one linear: exit code 1, the report is written whole, and says where."""
    assert (work / "fault.code").read_text() == "1", _said(work, "fault")
    expected = dict.fromkeys(CHECKS, "passed") | {"tensors": "failed", "logits": "failed"}
    report = json.loads((work / "fault.json").read_text())
    assert _statuses(work / "fault.json") in (expected, expected | {"generation": "failed"})
    assert (report["divergence"]["layer"], report["divergence"]["sublayer"]) == (2, "attention")
    said = (work / "fault.err").read_text()
    assert said.count("hidden states diverge at layer 2, attention") == 1, _said(work, "fault")


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number]["id"])
def test_every_case(work: Path, number: int) -> None:
    case = CASES[number]
    results = (
        json.loads((work / "results.json").read_text()) if (work / "results.json").is_file() else {}
    )
    assert case["id"] in results, _said(work, "cases")
    first, second = results[case["id"]]
    assert first["code"] == second["code"] == case.get("code", 0), (first, second)
    assert second["out"] == ""
    if says := case.get("says"):
        assert says in first["err"] and says not in second["err"]
        return
    report = json.loads((work / f"{number}.json").read_text())
    wanted = {"tensors", "config", "files", "logits"}
    wanted |= set() if "--quick" in case["options"] else {"generation"}
    wanted |= {"gradients"} if "--gradients" in case["options"] else set()
    assert _statuses(work / f"{number}.json") == dict.fromkeys(wanted, "passed") | case.get(
        "statuses", {}
    )
    logits = next(check for check in report["checks"] if check["name"] == "logits")
    print(
        case["id"],
        f"{report['seconds']:.1f} s:",
        logits["summary"],
        "; threshold",
        logits["threshold"],
    )


def test_every_start_ended(work: Path) -> None:
    assert (work / "cases.code").read_text() == "0", _said(work, "cases")
