"""Fingerprints name every patch whose target is not the code that the patch was written for."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.patches import tested_versions
from exaone_bridge.patches.fingerprints import fingerprint, known_fingerprints
from exaone_bridge.patches.table import PATCHES

MODULE = '''
"""A module."""
from .other import imported

if True:
    FLAG = any([])

def function(a):
    """Add one."""
    return a + 1  # one

class Base:
    def inherited(self): return 1

class Class(Base):
    @classmethod
    def method(cls): return 2
'''
TARGETS = {
    "fake_host.module:function": ("a + 1", "a + 2"),
    "fake_host.module:Class.method": ("return 2", "return 3"),
    "fake_host.module:Class.inherited": ("return 1", "return 4"),
    "fake_host.module:FLAG": ("any([])", "all([])"),
    "fake_host.module": ("a + 1", "a + 2"),
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of `fake_host.module`, which is on the import path."""
    (tmp_path / "fake_host").mkdir()
    (tmp_path / "fake_host" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "fake_host" / "other.py").write_text("def imported(): return 5\n")
    file = tmp_path / "fake_host" / "module.py"
    file.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_every_patch_knows_the_installed_code() -> None:
    """`python -m exaone_bridge.patches.fingerprints` adds those of the installed versions."""
    known = known_fingerprints()
    assert known.keys() == {patch.target for patch in PATCHES}
    assert [target for target in known if fingerprint(target) not in known[target]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_the_code_changes_the_fingerprint(module: Path, target: str) -> None:
    before = fingerprint(target)
    assert len(before) == 16
    module.write_text(MODULE.replace("# one", "# another comment").replace("Add one", "Adds 1"))
    assert fingerprint(target) == before
    module.write_text(MODULE.replace(*TARGETS[target]))
    assert fingerprint(target) not in (before, "")


def test_an_imported_function_is_followed_to_its_definition(module: Path) -> None:
    before = fingerprint("fake_host.module:imported")
    module.with_name("other.py").write_text("def imported(): return 6\n")
    assert fingerprint("fake_host.module:imported") not in (before, "")


@pytest.mark.parametrize(
    "target", ["fake_host.module:absent", "fake_host.absent:function", "absent_host.module:f"]
)
def test_absent_code_has_no_fingerprint(module: Path, target: str) -> None:
    assert fingerprint(target) == ""


def test_nothing_is_imported() -> None:
    program = (
        "import sys; from exaone_bridge.patches.fingerprints import *\n"
        "assert all(map(fingerprint, known_fingerprints()))\n"
        "print([name for name in sys.modules if name.startswith(('torch', 'megatron.'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a newer Megatron-Bridge than the tested one."""
    version = importlib.metadata.version
    versions = {"megatron-bridge": "0.7.0rc1+abc"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: versions.get(name) or version(name)
    )
    tested_versions.warn_of_newer_versions.cache_clear()


def test_a_newer_megatron_bridge_warns_once(megatron_bridge: Any, newer: None) -> None:
    import exaone_bridge

    with pytest.warns(UserWarning, match=r"megatron-bridge 0\.7\.0rc1\+abc is newer than 0\.6\.2"):
        exaone_bridge.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exaone_bridge.register()


def test_the_tested_versions_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", tested_versions.TESTED.__getitem__)
    assert tested_versions.newer_than_tested() == {}
