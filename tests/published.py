"""A published shape, verified in a process of its own whose peak of memory can be read off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# Ranks are its children, one after the other.
_SCRIPT = """
import json, resource, sys
from pathlib import Path
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.verify import verify

if __name__ == "__main__":
    report = verify(Path(sys.argv[1]), Layout(), tolerance=1e-3, count=1, length=64)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    checks = {check.name: [check.holds, check.figure] for check in report.checks}
    difference = report.max_logit_difference
    print(json.dumps({"peak_gib": peak / 2**20, "difference": difference, "checks": checks}))
"""


def verify_published(folder: Path, work: Path) -> dict[str, Any]:
    """`peak_gib`, `difference` (logits of 64 positions, fp32) and `checks` (name -> holds, figure) of one folder."""
    script = work / "verify.py"
    script.write_text(_SCRIPT)
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def assert_published_holds(found: dict[str, Any]) -> None:
    """Every check, and logits within 1e-3."""
    assert all(holds for holds, _ in found["checks"].values()), found["checks"]
    assert set(found["checks"]) == {"tensors", "config", "files", "logits"}
    assert 0 < found["difference"] <= 1e-3
