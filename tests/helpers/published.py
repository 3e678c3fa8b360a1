"""`verify` of a published shape with random weights, in a process whose peak memory is measured.

`python -m tests.helpers.published FOLDER` verifies the folder and prints the measurement as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.recipes.published import CONFIGS
from tests.helpers.paths import ROOT


@dataclass
class Measurement:
    """The result of `verify`, with its memory.

    Attributes:
        above_gib: peak memory in GiB of the process and its ranks, beyond that of the imports.
        seconds: the duration of `verify`.
        passed: check name -> whether it passed.
        difference: maximum absolute difference of the fp32 logits of 64 positions.
        failures: the text of the checks that failed.
        layerwise: whether `verify` ran layer by layer.
    """

    above_gib: float
    seconds: float
    passed: dict[str, bool]
    difference: float
    failures: str
    layerwise: bool


def verify_published(recipe: str, work: Path, record_property: Any) -> Measurement:
    """Write the published shape of a recipe with random bf16 weights, and verify it."""
    folder = work / "model"
    write_random(folder, CONFIGS[recipe])
    command = [sys.executable, "-m", "tests.helpers.published", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    measured = Measurement(**json.loads(done.stdout.splitlines()[-1]))
    print(measured)
    record_property("measured", asdict(measured))
    assert set(measured.passed) == {"tensors", "config", "files", "logits"}
    assert all(measured.passed.values()), measured.failures
    assert 0 < measured.difference <= 1e-3
    return measured


def _memory_gib() -> float:
    """Return the memory of this process and all below it; shared pages count once (PSS)."""
    kib, pids = 0, [os.getpid()]
    for pid in pids:
        try:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kib += int(next(line for line in rollup.splitlines() if line[:4] == "Pss:").split()[1])
        except (OSError, StopIteration):  # the process has ended
            pass
    return kib / 2**20


def main() -> None:
    """Verify the folder that the command line names, and print a `Measurement`."""
    import exaone_bridge

    exaone_bridge.supported()  # imports Megatron-Bridge, which the base includes
    base = _memory_gib()
    peaks = [base]

    def sample() -> None:
        while True:
            peaks[0] = max(peaks[0], _memory_gib())
            time.sleep(0.1)

    threading.Thread(target=sample, daemon=True).start()
    report = exaone_bridge.verify(sys.argv[1], count=1, length=64, generation=False)
    measured = Measurement(
        above_gib=peaks[0] - base,
        seconds=report.seconds,
        passed={check.name: bool(check.passed) for check in report.checks},
        difference=report.max_logit_difference,
        failures=report.failures(),
        layerwise=bool(report.setup["layer_by_layer"]),
    )
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
