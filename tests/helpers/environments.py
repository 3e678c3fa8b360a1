"""Environments of other versions and other engines, made by uv from its cache.

They link the torch of this environment, which would be gigabytes to install again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.helpers.paths import ROOT

UV = os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
LINKED = ("torch", "functorch", "nvidia", "triton")  # how their folders begin
NOT_INSTALLED = ("torch", "torchaudio", "torchvision", "triton")
# What else torch imports.
TORCH_NEEDS = ("fsspec", "jinja2", "networkx", "numpy", "setuptools", "sympy", "typing_extensions")


def run(*command: object, cwd: Path | None = None, env: Mapping[str, str] = {}) -> str:
    """Run a command without this project's own paths, and return its standard output."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=cwd, env=own | dict(env)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    return done.stdout


def make_environment(folder: Path, *packages: str, without: Sequence[str] = ()) -> Path:
    """Make an environment with these packages and the torch of this one.

    Args:
        folder: must not exist.
        packages: requirements of pip; none of them is torch.
        without: packages that are left out although others require them.

    Returns:
        The Python of the environment, which has pip.
    """
    python, overrides = folder / "bin" / "python", folder / "overrides.txt"
    run(UV, "venv", "--quiet", "--seed", "--python", sys.executable, folder)
    overrides.write_text(
        "".join(f"{name}; sys_platform == 'never'\n" for name in (*NOT_INSTALLED, *without))
    )
    install = [UV, "pip", "install", "--quiet", "--python", python, "--override", overrides]
    # In this repository, uv would add the overrides of pyproject.toml.
    run(*install, *TORCH_NEEDS, *packages, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in Path(torch.__file__).parents[1].iterdir():
        if path.name.startswith(LINKED) and not (site / path.name).exists():
            (site / path.name).symlink_to(path)
    return python
