"""Known messages are hidden by their text, unless the environment variable is set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import exaone_bridge
from exaone_bridge.patches.known_messages import LOGGED, SHOW_WARNINGS, WARNED
from exaone_bridge.patches.table import PATCHES

SOURCE = Path(exaone_bridge.__file__).parents[1]
# One module that logs its known message and another one when it is imported, as torch's does.
MODULE = "torch.utils.cpp_extension"
LOGS = f"""
import logging
logger = logging.getLogger({MODULE!r})
logger.warning({LOGGED[MODULE]!r} + "'/usr/local'")
logger.warning("CUDA has another fault")
"""
PROGRAM = """
import sys, warnings
if "late" in sys.argv:
    import torch.utils.cpp_extension
import exaone_bridge
from exaone_bridge.patches.known_messages import LOGGED, WARNED
import torch.utils.cpp_extension as fake
for start, category in WARNED.items():
    warnings.warn(start + " something", category)
    warnings.warn("Not known: " + start, UserWarning)
import logging
for name, start in LOGGED.items():
    if "late" in sys.argv or name == fake.__name__:
        logging.getLogger(name).warning(start + "something")
    logging.getLogger(name).warning("Not known: " + start)
"""
REAL = "import exaone_bridge; from megatron.bridge import AutoBridge"


def _run(program: str, *arguments: str, **environment: str) -> str:
    """Run a program in a new process, and return all that it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EXAONE")}
    inherited.pop("MEGATRON_SUPPRESS_FUSION_WARNINGS", None)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=inherited | {"PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=300,
    )
    return done.stdout


@pytest.fixture
def paths(tmp_path: Path) -> str:
    """Return an import path with a fake torch, whose import takes no time."""
    folder = tmp_path / "torch" / "utils"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    (folder / "cpp_extension.py").write_text(LOGS)
    return os.pathsep.join([str(tmp_path), str(SOURCE)])


def test_known_messages_are_hidden_and_others_appear(paths: str) -> None:
    printed = _run(PROGRAM, PYTHONPATH=paths)
    assert "CUDA has another fault" in printed
    for start in (*WARNED, *LOGGED.values()):
        assert printed.count(start) == printed.count(f"Not known: {start}") > 0


def test_a_module_that_was_imported_before_is_filtered(paths: str) -> None:
    printed = _run(PROGRAM, "late", PYTHONPATH=paths)
    start = LOGGED[MODULE]
    assert printed.count(start + "something") == 0 and printed.count(f"Not known: {start}") == 1


def test_the_variable_shows_them(paths: str) -> None:
    printed = _run(PROGRAM, PYTHONPATH=paths, **{SHOW_WARNINGS: "1"})
    for start in (*WARNED, LOGGED[MODULE]):
        assert printed.count(start) >= 2


def test_no_patch_replaces_the_hook_of_a_logger() -> None:
    """A module has one import hook."""
    assert not LOGGED.keys() & {patch.target.partition(":")[0] for patch in PATCHES}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None,
    reason="Transformer Engine is installed here",
)
def test_importing_megatron_bridge_prints_nothing() -> None:
    """A warning that is not known still appears, and the variable shows the others."""
    unknown = "; import warnings; warnings.warn('Apex is not known')"
    assert _run(REAL + unknown) == "<string>:1: UserWarning: Apex is not known\n"
    printed = _run(REAL, **{SHOW_WARNINGS: "1"})
    assert "Apex is not installed. Falling back to Torch Norm" in printed
    assert LOGGED["megatron.bridge.utils.import_utils"] in printed
