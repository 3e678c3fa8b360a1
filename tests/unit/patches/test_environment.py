"""A user without passwd entry and home, and a home that takes no locks."""

from __future__ import annotations

import ctypes
import fcntl
import getpass
import importlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.patches import environment

VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "MEGATRON_CONFIG_LOCK_DIR")


def _unknown(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of a process without these variables."""
    for name in VARIABLES:  # setenv first, so that what the code sets is removed afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(environment, "_warned", set())
    return tmp_path / f"exaone_bridge-uid{os.getuid()}"


def test_a_uid_without_passwd_entry_gets_a_name_and_a_home(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _unknown)
    for _ in range(2):
        environment.provide_user_and_home()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert Path.home() == bare and bare.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == (
        f"exaone-bridge: no home folder: caches are in {bare}; set HOME to name another.\n"
    )


def test_what_is_there_is_not_replaced(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.provide_user_and_home()
    assert "USER" not in os.environ and "HOME" not in os.environ
    monkeypatch.setattr(pwd, "getpwuid", _unknown)
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setenv("HOME", "/there")
    environment.provide_user_and_home()
    assert (getpass.getuser(), os.environ["HOME"]) == ("me", "/there") and not bare.exists()


def test_a_folder_of_somebody_else_is_not_used(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwuid", _unknown)
    (bare.parent / "theirs").mkdir()
    bare.symlink_to("theirs")
    environment.provide_user_and_home()
    assert Path.home().name.startswith(f"{bare.name}-")


@pytest.mark.parametrize("fault", ["no locks", "no home to write to", None])
def test_megatron_bridge_locks_where_it_can(
    fault: str | None,
    bare: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setenv("HOME", "/proc/home" if fault == "no home to write to" else str(tmp_path))
    if fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    environment.provide_lock_folder()
    assert os.environ.get("MEGATRON_CONFIG_LOCK_DIR") == (str(bare) if fault else None)
    assert ("takes no locks" in capsys.readouterr().err) == bool(fault)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
def test_commands_run_for_a_uid_without_passwd_entry_and_home(tmp_path: Path) -> None:
    """It may read everything, as in a container, whose files others may read."""
    work = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(work, 12345, 12345)
    user = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"]
    user += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    user += ["env", "-i", "PATH=/usr/bin:/bin", f"PYTHONPATH={os.pathsep.join(sys.path)}"]
    try:
        for command in (
            "tiny exaone4 model",
            "inspect model",
            "import model megatron",
            "export megatron exported",
            "verify model --quick",
        ):
            run = subprocess.run(
                [*user, sys.executable, "-m", "exaone_bridge", *command.split()],
                cwd=work,
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"{command}: {run.stderr[-2000:]}"
            assert run.stderr.count("no home folder") == 1
    finally:
        shutil.rmtree(work)
        shutil.rmtree("/tmp/exaone_bridge-uid12345", ignore_errors=True)


@pytest.mark.parametrize("chosen", [None, "true"])
def test_tokenizers_are_sequential_after_a_fork_unless_the_user_says_otherwise(
    megatron_bridge: Any, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """Megatron-Bridge makes them parallel, and the first batch in a forked process never ended."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", chosen or "")
    if chosen is None:
        monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    monkeypatch.delitem(sys.modules, "megatron.bridge.data.datasets.gpt_sft", raising=False)
    importlib.import_module("megatron.bridge.data.datasets.gpt_sft")
    assert getenv(b"TOKENIZERS_PARALLELISM") == (chosen.encode() if chosen else None)
