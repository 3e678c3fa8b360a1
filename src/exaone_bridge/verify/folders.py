"""Compares Hugging Face folders: tensors bit by bit, configurations key by key, files byte by byte. No torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.headers import TensorInfo, read_headers
from exaone_bridge.parts.files import TRAVELLING_FILES
from exaone_bridge.verify.report import Check

__all__ = ["compare_configs", "compare_files", "compare_tensors"]


def _bytes_of(tensors: Mapping[str, TensorInfo]) -> dict[Path, mmap.mmap]:
    maps = {}
    for path in {tensor.file for tensor in tensors.values()}:
        with path.open("rb") as file:
            maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return maps


def compare_tensors(left: Path, right: Path) -> Check:
    """Names both ways, types, shapes and every bit of every tensor.

    Raises:
        CheckpointError: a folder that cannot be read.
    """
    first, second = read_headers(left), read_headers(right)
    faults = [f"{name} is missing" for name in sorted(first.keys() - second.keys())]
    faults += [f"{name} was added" for name in sorted(second.keys() - first.keys())]
    maps = _bytes_of(first) | _bytes_of(second)
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name], second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            faults.append(f"{name} is {a.dtype} {list(a.shape)}, then {b.dtype} {list(b.shape)}")
        elif not _same_bytes(maps[a.file], a, maps[b.file], b):
            faults.append(f"{name} differs")
    figure = f"{len(first)} tensors bitwise equal" if not faults else f"{len(faults)} of {len(first)} tensors differ"
    return Check("tensors", figure, not faults, "; ".join(faults[:5]))


def _same_bytes(left: mmap.mmap, a: TensorInfo, right: mmap.mmap, b: TensorInfo, step: int = 1 << 24) -> bool:
    return all(
        left[a.offset + at : a.offset + min(at + step, a.nbytes)]
        == right[b.offset + at : b.offset + min(at + step, b.nbytes)]
        for at in range(0, a.nbytes, step)
    )


def compare_configs(left: Mapping[str, Any], right: Mapping[str, Any]) -> Check:
    """Key by key, both ways, less the version stamp."""
    keys = (left.keys() | right.keys()) - {"transformers_version"}
    faults = [
        f"{key}: {left.get(key, '(absent)')!r}, then {right.get(key, '(absent)')!r}"
        for key in sorted(keys)
        if (key in left) != (key in right) or _text(left.get(key)) != _text(right.get(key))
    ]
    figure = f"{len(keys)} keys equal" if not faults else f"{len(faults)} of {len(keys)} keys differ"
    return Check("config", figure, not faults, "; ".join(faults[:5]))


def _text(value: Any) -> str:
    """As a file has it: 1, 1.0 and true are three values."""
    return json.dumps(value, sort_keys=True)


def compare_files(left: Path, right: Path) -> Check:
    """Tokenizer, chat template and generation config, byte for byte, both ways."""
    names = {
        path.name
        for folder in (left, right)
        for glob in TRAVELLING_FILES
        for path in folder.glob(glob)
        if path.is_file()
    }
    faults = [
        name
        for name in sorted(names)
        if not ((left / name).is_file() and (right / name).is_file())
        or (left / name).read_bytes() != (right / name).read_bytes()
    ]
    figure = f"{len(names)} files equal" if not faults else f"{len(faults)} of {len(names)} files differ"
    return Check("files", figure, not faults, ", ".join(faults[:5]))
