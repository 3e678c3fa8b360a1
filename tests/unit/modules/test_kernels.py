"""Triton's interpreter runs the kernels of SwiGLU and of QK norm with RoPE on the CPU; on the GPU: tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.helpers.paths import ROOT


def test_kernels_are_their_formulas() -> None:
    script = ROOT / "tests" / "helpers" / "kernel_formulas.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
