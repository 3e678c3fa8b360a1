"""docs/dev/adding-a-model.md, followed to the letter in a copy of the source, adds a model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

GUIDE = ROOT / "docs" / "dev" / "adding-a-model.md"


def replace(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for before, after in pairs:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)


def follow_the_guide(source: Path) -> None:
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"^```python\n# src/(\S+)\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert len(files) == 8
    for name, text in files:
        path = source / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    replace(
        source / "exaone_bridge" / "models" / "__init__.py",
        ("FAMILIES: tuple[ModelFamily, ...] = (", "FAMILIES: tuple[ModelFamily, ...] = (QWEN3, "),
        (
            "from exaone_bridge.schema.model_family",
            "from exaone_bridge.models.qwen3 import QWEN3\nfrom exaone_bridge.schema.model_family",
        ),
    )
    replace(
        source / "exaone_bridge" / "bridge" / "registration.py",
        (
            "    bridges = (",
            "    from exaone_bridge.bridge.qwen3 import Qwen3ExactBridge\n\n"
            "    bridges = (Qwen3ExactBridge, ",
        ),
    )


@pytest.mark.slow
def test_the_guide_adds_a_model_that_verify_passes(tmp_path: Path) -> None:
    follow_the_guide(tmp_path / "src")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "exaone_bridge", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("tiny", "qwen3", "model")
    assert "qwen3" in run("inspect", "model", "--tp", "2", "--pp", "2")
    run("verify", "model", "--tp", "2", "--quick")
