"""The types of the command line's fixtures, and readers of checkpoint folders and of printed tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"
Cli = Callable[..., Any]
Snapshot = Callable[[Path], dict[str, object]]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def files_of(folder: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, by safetensors."""
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


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def mappings_of(out: str) -> list[list[str]]:
    """The cells of the tables in `out`, heads first."""
    return [
        [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        for line in out.splitlines()
        if line.startswith(("│", "┃"))
    ]


def assert_equal_folders(exported: Path, source: Path) -> None:
    """Bits, configuration and files of an export are the source's, by other eyes than `verify`'s."""
    assert same_bits(tensors_of(exported), tensors_of(source))
    config, wanted = config_of(exported), config_of(source)
    assert config == wanted
    assert files_of(exported) == files_of(source)
    text = {
        path.name: path.read_bytes()
        for path in source.iterdir()
        if not path.name.startswith("model")
    }
    assert {
        path.name: path.read_bytes()
        for path in exported.iterdir()
        if not path.name.startswith("model")
    } == text
