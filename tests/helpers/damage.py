"""Damages of a Hugging Face folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"
Damage = Callable[[Path], object]


def set_config(**fields: object) -> Damage:
    """Change config.json; a field set to `...` is taken out."""

    def damage(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **fields}
        kept = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def set_rope(**fields: object) -> Damage:
    def damage(folder: Path) -> None:
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        set_config(rope_parameters=rope | fields)(folder)

    return damage


def config_text(text: str) -> Damage:
    return lambda folder: (folder / "config.json").write_text(text)


def set_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def set_bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def set_header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights' file, and not its data."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def overlap(header: dict[str, Any]) -> None:
    """Two tensors of the same size share their bytes."""
    header[Q_PROJ]["data_offsets"] = header["model.layers.1.self_attn.q_proj.weight"][
        "data_offsets"
    ]


def into_pickles(*names: str) -> Damage:
    """Only pickles are left, and loading one of them writes a file."""

    class Bomb:
        def __init__(self, path: str) -> None:
            self.path = path

        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (self.path,)

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).write_bytes(pickle.dumps(Bomb(str(folder / "loaded"))))

    return damage


def in_shards(change: Callable[[Path, dict[str, Any]], object]) -> Damage:
    """For the sharded tiny model: change its files or its index."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(folder, index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def elsewhere(name: str) -> Damage:
    """The index sends the tensors of the first shard to `name`, where a good file lies."""

    def change(folder: Path, index: dict[str, Any]) -> None:
        first = "model-00001-of-00003.safetensors"
        target = Path(name.format(tmp=folder.parent))
        (folder / target).parent.mkdir(exist_ok=True)
        shutil.move(folder / first, folder / target)
        index["weight_map"] = {
            tensor: str(target) if file == first else file
            for tensor, file in index["weight_map"].items()
        }

    return in_shards(change)


def misplace(folder: Path, index: dict[str, Any]) -> None:
    """The index sends one tensor to a shard that does not hold it."""
    first, second, _ = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q_PROJ] = second if index["weight_map"][Q_PROJ] == first else first


def link_out(folder: Path, index: dict[str, Any]) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder.parent / "outside.safetensors")
    shard.symlink_to(folder.parent / "outside.safetensors")
