"""`benchmarks/convert.py` runs: its small version, on what takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_small_benchmark_prints_its_ratios(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "convert.py"
    options = ["--small", "--repeats", "1", "--work", str(tmp_path), "--only", "load", "--only", "stream"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in (
        "| planned / plain copy",
        "| host / planned",
        "| import, small:",
        "files that differ after the round trip | 0",
    ):
        assert line in done.stdout
