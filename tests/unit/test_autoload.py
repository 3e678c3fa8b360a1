"""EXAONE_BRIDGE_AUTOLOAD=1 imports exaone_bridge at the start of every process, and only that."""

from __future__ import annotations

import json
import site
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.autoload import PTH, environment_with_pth

_MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"
_SPAWN = """
import multiprocessing, sys

def loaded(_=None):
    return "exaone_bridge" in sys.modules

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(loaded(), *pool.map(loaded, [None]))
"""


def _run(*arguments: object, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_variable_no_module_is_imported(tmp_path: Path, value: str | None) -> None:
    chosen = {} if value is None else {"EXAONE_BRIDGE_AUTOLOAD": value}
    env = environment_with_pth(tmp_path, **chosen)
    with_pth = set(json.loads(_run("-c", _MODULES, env=env)))
    (tmp_path / "sitecustomize.py").write_text("import site\n")
    assert with_pth == set(json.loads(_run("-c", _MODULES, env=env)))


def test_with_the_variable_spawned_processes_have_it_and_no_torch(tmp_path: Path) -> None:
    env = environment_with_pth(tmp_path / "site", EXAONE_BRIDGE_AUTOLOAD="1")
    modules = json.loads(_run("-c", _MODULES, env=env))
    assert "exaone_bridge" in modules and "torch" not in modules and "megatron" not in modules
    (tmp_path / "script.py").write_text(_SPAWN)
    assert _run(tmp_path / "script.py", env=env).split() == ["True", "True"]


def test_the_file_costs_a_start_less_than_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reads and executes it with `site.addpackage`; it takes about 0.03 ms."""
    monkeypatch.delenv("EXAONE_BRIDGE_AUTOLOAD", raising=False)

    def seconds() -> float:
        start = time.perf_counter()
        site.addpackage(str(PTH.parent), PTH.name, set())
        return time.perf_counter() - start

    assert min(seconds() for _ in range(100)) < 1e-3


def test_a_broken_installation_does_not_stop_python(tmp_path: Path) -> None:
    """Python prints the traceback of a .pth file, and starts."""
    env = environment_with_pth(tmp_path, EXAONE_BRIDGE_AUTOLOAD="1")
    (tmp_path / "exaone_bridge.py").write_text("raise ImportError('broken')\n")
    done = subprocess.run(
        [sys.executable, "-c", "print(1)"], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "1\n") and "broken" in done.stderr
