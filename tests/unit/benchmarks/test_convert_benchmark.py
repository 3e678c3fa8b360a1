"""`benchmarks/convert.py` runs: its small version, on what takes seconds."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT
from tests.helpers.scripts import fork_script

SCRIPT = ROOT / "benchmarks" / "convert.py"


def test_the_small_benchmark_prints_its_ratios(megatron_bridge: Any, tmp_path: Path) -> None:
    options = [
        "--small",
        "--repeats",
        "1",
        "--work",
        str(tmp_path / "work"),
        "--only",
        "load",
        "--only",
        "stream",
    ]
    printed = fork_script(tmp_path, SCRIPT, *options)
    for line in (
        "| planned / plain copy",
        "| Megatron-Bridge / planned",
        "| import, small:",
        "files that differ after the round trip | 0",
    ):
        assert line in printed


def test_what_takes_no_time_has_a_clock_or_no_ratio(megatron_bridge: Any) -> None:
    script = runpy.run_path(str(SCRIPT))
    before = script["cpu_seconds"]()
    started = time.process_time()
    while time.process_time() - started < 0.001:  # a tenth of what os.times counts
        pass
    assert 0 < script["cpu_seconds"]() - before < 1
    assert script["ratio"](0.5, 0.25) == "2.00"
    assert script["ratio"](0.5, 0.0) == "-"
