"""Folders whose configs name Python code: it never runs, and our own architecture is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import Cli
from tests.helpers.damage import set_config

CODE = {"AutoConfig": "remote.C", "AutoModelForCausalLM": "remote.Ernie4_5_MoeForCausalLM"}


@pytest.fixture
def published(tiny: Any, tmp_path: Path) -> Path:
    """Return ERNIE as its publisher writes it, with code that writes a file when it runs."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("ernie45-300b"), folder)
    set_config(auto_map=CODE)(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {
        "auto_map": {"AutoTokenizer": ["remote.T", None]},
        "tokenizer_class": "Ernie4_5_Tokenizer",
    }
    path.write_text(json.dumps(config))
    trace = tmp_path / "remote_code_ran"
    (folder / "remote.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: pass\n")
    return folder


def test_no_remote_code_runs_and_the_fields_are_carried(
    megatron_bridge: Any, published: Path, tmp_path: Path, cli: Cli
) -> None:
    commands: list[list[object]] = [
        ["inspect", published],
        ["import", published, tmp_path / "megatron"],
        ["export", tmp_path / "megatron", tmp_path / "exported"],
        ["verify", published],
    ]
    for command in commands:
        run = cli(*command)
        assert run.code == 0, (command, run.out, run.err)
    assert "not run: the tokenizer needs remote code" in run.out
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["auto_map"] == CODE
    assert not (tmp_path / "remote_code_ran").exists()
