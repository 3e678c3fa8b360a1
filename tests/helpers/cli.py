"""Types of the fixtures of tests/unit/cli, and readers of checkpoint folders and printed tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"
Snapshot = Callable[[Path], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Run:
    """The exit code and the output of one command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Run]
Rejected = Callable[..., None]


def arguments_of(command: str, folder: Path) -> list[object]:
    """Return the command on `folder`; `import` and `export` write to `output` beside it."""
    output = [folder.parent / "output"] if command in ("import", "export") else []
    return [command, folder, *output]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def file_of_each_tensor(folder: Path) -> dict[str, str]:
    """Return tensor name -> name of its file, read by safetensors."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype
        and tensor.shape == right[name].shape
        and torch.equal(bits(tensor), bits(right[name]))
        for name, tensor in left.items()
    )


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def table_rows(out: str) -> list[list[str]]:
    """Return the cells of each row of the tables in `out`; the header is the first row."""
    return [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if line.startswith(("│", "┃"))
    ]


def assert_equal_folders(exported: Path, source: Path) -> None:
    """Check tensors bitwise, config.json and files without the code that `verify` uses."""
    assert same_bits(read_tensors(exported), read_tensors(source))
    assert read_config(exported) == read_config(source)
    assert file_of_each_tensor(exported) == file_of_each_tensor(source)
    exported_files, source_files = (
        {
            path.name: path.read_bytes()
            for path in folder.iterdir()
            if not path.name.startswith("model")
        }
        for folder in (exported, source)
    )
    assert exported_files == source_files
