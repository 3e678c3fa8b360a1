"""A checkpoint in several files, for tests of the command line and of checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.damage import INDEX

SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]


@pytest.fixture(scope="session")
def reshard() -> Callable[[Path], None]:
    """Return `reshard(folder)`: it splits model.safetensors into three files with an index.

    Tensors that follow each other by name go to different files.
    """

    def split(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: SHARDS[number % 3] for number, name in enumerate(sorted(tensors))}
        for shard in SHARDS:
            shard_tensors = {
                name: tensors[name] for name, file in weight_map.items() if file == shard
            }
            save_file(shard_tensors, folder / shard, metadata={"format": "pt"})
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index))

    return split


@pytest.fixture(scope="session")
def sharded(
    tiny: Callable[..., Path],
    reshard: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Return the tiny EXAONE 4.0 with sliding-window layers, split into three files."""
    folder = tmp_path_factory.mktemp("sharded") / "exaone4"
    shutil.copytree(tiny("exaone4"), folder)
    reshard(folder)
    return folder
