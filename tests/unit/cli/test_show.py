"""Tables on terminals of any width, and the shell's completion."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.console import Console

from exaone_bridge.cli import show
from tests.helpers.cli import Cli

ROWS = [
    ["tensors", "96 of 96 bitwise equal", "passed"],
    ["first divergence", "model.layers.3.self_attn.q_norm differs by 0.12", "FAILED"],
]


@pytest.mark.parametrize("width", [30, 60, 72, 80, 160])
def test_no_word_of_a_table_is_split(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "console", Console(width=width, color_system=None))
    show.table("a title", ["check", "summary", "status"], ROWS)
    out = capsys.readouterr().out
    words = {word for row in ROWS for cell in row for word in cell.split()}
    assert words - {"model.layers.3.self_attn.q_norm"} <= set(out.split())
    assert "model.layers.3.self_attn.q_norm" in out or width < 32
    assert max(map(len, out.splitlines())) <= width


def test_bash_completes_commands_and_options(cli: Cli) -> None:
    run = cli("--print-completion", "bash")
    assert run.code == 0
    script = run.out + "\nCOMP_WORDS=(exaone-bridge ver); COMP_CWORD=1; _shtab_exaone_bridge"
    script += '; echo "${COMPREPLY[@]}"; COMP_WORDS=(exaone-bridge import --dry)'
    script += '; COMP_CWORD=2; _shtab_exaone_bridge; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["verify", "--dry-run"]


def test_completion_without_shtab_names_what_to_install(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    run = cli("--print-completion", "bash")
    assert run.code == 2 and "pip install 'exaone-bridge[completion]'" in run.err
