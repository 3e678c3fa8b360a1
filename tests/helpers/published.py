"""A published shape, verified in a process of its own whose peak of memory can be read off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Memory is that of this process and of the ranks it forks, shared pages counted once (PSS), sampled as it goes; the
# interpreter's is what is there when Megatron has been imported.
_SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path
import exaone_bridge

def held():
    pids, todo = [], [os.getpid()]
    while todo:
        pids.append(pid := todo.pop())
        try:
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:
            pass
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
        except (OSError, StopIteration):
            pass
    return total / 2**20

def watch():
    while True:
        peaks[0] = max(peaks[0], held())
        time.sleep(0.1)

if __name__ == "__main__":
    exaone_bridge.supported()
    base = held()
    peaks = [base]
    threading.Thread(target=watch, daemon=True).start()
    report = exaone_bridge.verify(sys.argv[1], count=1, length=64, generation=False)
    checks = {check.name: [check.passed, check.summary, check.threshold] for check in report.checks}
    found = {"above_gib": peaks[0] - base, "interpreter_gib": base, "seconds": report.seconds, "checks": checks}
    found |= {"difference": report.max_logit_difference, "faults": report.failures(), "setup": dict(report.setup)}
    print(json.dumps(found))
"""


def verify_published(folder: Path, work: Path) -> dict[str, Any]:
    """`above_gib`, `difference` (logits of 64 positions, fp32) and `checks` (name -> holds, figure) of one folder."""
    script = work / "verify.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def assert_published_passes(found: dict[str, Any]) -> None:
    """Every check, by the bounds of rounding."""
    assert all(passed for passed, *_ in found["checks"].values()), found["faults"]
    assert set(found["checks"]) == {"tensors", "config", "files", "logits"}
    assert 0 < found["difference"] <= 1e-3
