"""The clock of `recipes/start_up.py` begins with the process, not with its first import."""

from __future__ import annotations

import subprocess
import sys


def test_clock_counts_what_happened_before_the_first_import() -> None:
    code = (
        "import time; time.sleep(1); begin = time.perf_counter();"
        "import sys, unittest.mock as mock;"
        "sys.modules['megatron.bridge.training.callbacks'] = mock.MagicMock(Callback=object);"
        "from exaone_bridge.recipes.start_up import seconds_since_process_start as seconds;"
        "print(seconds(), time.perf_counter() - begin)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    since_start, since_sleep = map(float, done.stdout.split())
    assert since_sleep + 0.9 < since_start < since_sleep + 30
