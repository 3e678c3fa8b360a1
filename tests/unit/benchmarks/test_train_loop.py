"""`benchmarks/train_loop.py` without GPUs: rows, ratios, tables, failures and the time limit."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exaone_bridge.errors import UnsupportedConfig
from tests.helpers.paths import ROOT

RECIPE = "exaone4_1p2b_pretrain_config"

# Measures each row that it is given, unless the row's name says what happens instead.
RANK = """
import json, os, sys, time
folder, numbers = sys.argv[1], sys.argv[2:]
rows = json.load(open(f"{folder}/session.json"))["rows"]
open(f"{folder}/starts", "a").write(f"{os.environ.get('A_VARIABLE')} {numbers}\\n")
for row in (rows[int(number)] for number in numbers):
    if row["name"] == "dies":
        os._exit(7)
    if row["name"] == "hangs":
        time.sleep(100)
    if row["name"] == "stops":
        break
    result = {"row": row["name"], "gpus": row["gpus"], "seq_length": 64, "ms": 10.0 / row["gpus"]}
    result |= {"min_ms": 9.0, "max_ms": 11.0, "tokens_per_s_per_gpu": 100 - 10 * row["gpus"]}
    if row["name"] == "fails":
        result = {"row": "fails", "gpus": row["gpus"], "failed": "OutOfMemoryError: no room"}
    open(f"{folder}/results.jsonl", "a").write(json.dumps(result) + "\\n")
    if row["name"] == "fails":
        os._exit(3)
"""


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("train_loop")


def _rows(benchmark: ModuleType, arguments: list[str]) -> tuple[Any, list[Any]]:
    options = benchmark.arguments().parse_args(arguments)
    return options, benchmark.rows_of(options.table, options.row, options.variant)


@pytest.fixture
def session(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Return what runs rows, each "NAME: RECIPE SETTINGS", in processes that only pretend."""

    def command(self: Any, numbers: list[int]) -> list[str]:
        return [sys.executable, "-c", RANK, str(self.folder), *map(str, numbers)]

    def run(*rows: str, limit_s: float = 60, start_s: float = 20) -> list[dict[str, Any]]:
        monkeypatch.setattr(benchmark, "START_S", start_s)
        arguments = [word for row in rows for word in ("--row", row)]
        options, measured = _rows(benchmark, [*arguments, "--limit-s", str(limit_s)])
        monkeypatch.setattr(benchmark.Session, "command", command)
        return benchmark.Session(tmp_path, measured, options).run()

    return run


def test_settings_of_a_row(benchmark: ModuleType) -> None:
    loop_rows = importlib.import_module("loop_rows")
    _, (plain, again, graphs) = _rows(
        benchmark,
        ["--row", f"TP2: {RECIPE} gpus=2 tp=2 layers=3 train.train_iters=7 NVTE_X=1",
         "--variant", "plain:", "--variant", "graphs: gpus=4 tp=1 emulate=true",
         "--variant", "again:"]
    )  # fmt: skip
    assert again == replace(plain, name="TP2, again")  # next to those with the same variables
    assert plain == loop_rows.Row(
        name="TP2, plain",
        recipe=RECIPE,
        gpus=2,
        arguments={"tp": 2, "sp": True},
        overrides=["train.train_iters=7"],
        environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_X": "1"},
        layers=3,
    )
    assert graphs.environment == {"NVTE_X": "1"}
    assert (graphs.name, graphs.arguments) == ("TP2, graphs", {"tp": 1, "sp": False})
    assert (graphs.emulate, graphs.gpus, graphs.processes) == (True, 4, 1)
    with pytest.raises(ValueError, match="NAME: RECIPE SETTINGS"):
        loop_rows.parse_row("tp=2")
    with pytest.raises(UnsupportedConfig, match="recipe is 'nope'"):
        loop_rows.parse_row("a: nope tp=2")


def test_ratio_is_to_the_first_row_of_one_gpu_with_the_same_model_and_length(
    session: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    results = session(
        f"one: {RECIPE}",
        f"two: {RECIPE} gpus=2",
        "other: ernie45_0p3b_pretrain_config gpus=2",
        "LoRA: exaone4_1p2b_peft_config",
    )
    assert [result.get("against_one_gpu") for result in results] == [
        1.0,
        round(80 / 90, 3),
        None,
        1.0,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["one", "two", "other", "LoRA"]
    assert "| 5.0 | 9.0 to 11.0 | 80 |" in lines[1]


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("fails", "OutOfMemoryError: no room"),
        ("dies", "the processes ended with 7"),
        ("stops", "no time left"),
    ],
)
def test_rows_after_one_without_a_result(
    name: str, failed: str, session: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """They run in new processes, unless the ranks have stopped because of the time."""
    first, second, third = session(f"a: {RECIPE}", f"{name}: {RECIPE}", f"b: {RECIPE}")
    assert "ms" in first and second["failed"] == failed
    assert third.get("failed") == ("no time left" if name == "stops" else None)
    starts = (tmp_path / "starts").read_text().splitlines()
    again = {"fails": ["['2']"], "dies": ["['1', '2']", "['2']"], "stops": []}[name]
    assert starts == ["None ['0', '1', '2']", *(f"None {numbers}" for numbers in again)]


def test_rows_with_other_variables_run_in_other_processes(
    session: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    session(f"a: {RECIPE}", f"b: {RECIPE} A_VARIABLE=1", f"c: {RECIPE} A_VARIABLE=1")
    starts = (tmp_path / "starts").read_text().splitlines()
    assert starts == ["None ['0']", "1 ['1', '2']"]


def test_time_limit_ends_a_row_and_names_the_rest(
    session: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    results = session(f"a: {RECIPE}", f"hangs: {RECIPE}", f"b: {RECIPE}", limit_s=4, start_s=1)
    assert time.monotonic() - begin < 20
    assert "ms" in results[0]
    assert [result["failed"] for result in results[1:]] == ["no time left"] * 2
    assert capsys.readouterr().out.count("no time left") == 2


def test_command_line_writes_a_table_and_json(tmp_path: Path) -> None:
    """Without time nothing is started."""
    command = [sys.executable, str(ROOT / "benchmarks/train_loop.py"), "--table", "tp8-rank"]
    done = subprocess.run(
        [*command, "--limit-s", "0", "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "| 1 of 8 | no time left |" in done.stdout, done.stderr
    assert [row["gpus"] for row in json.loads((tmp_path / "out.json").read_text())] == [8]
    assert "kernels, ms" in done.stdout
