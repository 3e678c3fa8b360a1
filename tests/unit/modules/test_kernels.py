"""The Triton kernels on the CPU, in Triton's interpreter; tests/gpu runs them on the GPU."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.paths import ROOT


def test_kernels_equal_their_formulas() -> None:
    script = ROOT / "tests" / "helpers" / "kernel_formulas.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
