"""The command line in this process, and a Megatron checkpoint for tests that only read it."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.cli import main
from tests.helpers.cli import Cli, Rejected, Run, Snapshot


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function; `cli("inspect", folder)` runs `exaone-bridge inspect folder` here.

    The working directory and all temporary files are inside `tmp_path`, where a test can look for
    files that a command left behind.
    """
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    disabled = logging.root.manager.disable

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["exaone-bridge", *map(str, arguments)])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            logging.disable(disabled)
        code = ended.value.code
        out, err = capsys.readouterr()
        return Run(code if isinstance(code, int) else int(code is not None), out, err)

    return run


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """Return `snapshot(folder)`: path -> bytes, link target or "folder", of everything inside."""

    def take(folder: Path) -> dict[str, object]:
        return {
            str(path.relative_to(folder)): path.readlink()
            if path.is_symlink()
            else "folder"
            if path.is_dir()
            else path.read_bytes()
            for path in folder.rglob("*")
        }

    return take


@pytest.fixture
def rejected(cli: Cli, snapshot: Snapshot, tmp_path: Path) -> Rejected:
    """Return `rejected(arguments, *fragments)`: the command must fail and change nothing.

    Its exit code is 2, and its only error output is one sentence with these fragments.
    """

    def check(arguments: list[object], *fragments: str) -> None:
        before = snapshot(tmp_path)
        run = cli(*arguments)
        assert run.code == 2, run
        assert snapshot(tmp_path) == before
        assert "Traceback" not in run.out + run.err
        (line,) = run.err.splitlines()
        assert line.startswith("exaone-bridge: ") and line.endswith(".")
        for fragment in fragments:
            assert fragment in line

    return check


@pytest.fixture(scope="session")
def megatron_folder(
    megatron_bridge: Any, sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the Megatron checkpoint imported from `sharded`; copy it before changing it."""
    from exaone_bridge.convert.to_megatron import import_checkpoint
    from exaone_bridge.schema.parallel_layout import Layout

    folder = tmp_path_factory.mktemp("megatron") / "exaone4"
    import_checkpoint(sharded, folder, Layout(tp=2, pp=2), workers=3)
    return folder


@pytest.fixture
def layer_2_without_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault into the arithmetic only: layer 2 (0-based) uses full attention."""
    from exaone_bridge.modules import attention

    original = attention.is_layer_window_attention

    def without_window(window: Any, skip: Any, layer_number: int) -> bool:
        return layer_number != 3 and original(window, skip, layer_number)

    monkeypatch.setattr(attention, "is_layer_window_attention", without_window)
