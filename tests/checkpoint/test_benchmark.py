"""`benchmarks/convert.py` runs: its small version, on what takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts import fork_script


def test_the_small_benchmark_prints_its_ratios(host: Any, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "convert.py"
    options = ["--small", "--repeats", "1", "--work", str(tmp_path / "work"), "--only", "load", "--only", "stream"]
    printed = fork_script(tmp_path, script, *options)
    for line in (
        "| planned / plain copy",
        "| host / planned",
        "| import, small:",
        "files that differ after the round trip | 0",
    ):
        assert line in printed
