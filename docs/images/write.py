"""Draws report.svg: the plot of the failing report that docs/verification.md shows.

python docs/images/write.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import exaone_bridge
from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.verification.report.plot import plot_image


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        model, copy = Path(work, "model"), Path(work, "copy")
        exaone_bridge.write_random(model, TINY["exaone4"])
        shutil.copytree(model, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
        report = exaone_bridge.verify(model, copy, quick=True)
    Path(__file__).with_name("report.svg").write_text(plot_image(report.activations))


if __name__ == "__main__":
    main()
