"""The .pth file of the wheel, for new processes, as an installation would have it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.paths import ROOT

PTH = ROOT / "src" / "exaone_bridge_autoload.pth"


def environment_with_pth(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment variables of a process that reads the .pth file when it starts.

    The environment that runs the tests may be older than the file, so `sitecustomize` of `folder`
    has Python process it once more, by the function that processes those of an installation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PTH.name).write_bytes(PTH.read_bytes())
    (folder / "sitecustomize.py").write_text(
        f"import site\nsite.addpackage({str(folder)!r}, {PTH.name!r}, set())\n"
    )
    kept = {name: text for name, text in os.environ.items() if name != "EXAONE_BRIDGE_AUTOLOAD"}
    path = os.pathsep.join([str(folder), str(ROOT / "src"), str(ROOT)])
    return kept | {"PYTHONPATH": path} | more
