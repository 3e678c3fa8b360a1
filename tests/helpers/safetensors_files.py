"""Small safetensors files, sound and damaged, and what the safetensors package reads of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import deserialize, safe_open

from exaone_bridge.checkpoint.hf.headers import TensorInfo
from exaone_bridge.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def entry(
    begin: object = 0, end: object = 8, shape: object = (2,), dtype: object = "F32", **more: object
) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def file_bytes(header: bytes | dict[str, object], data_bytes: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(data_bytes))


def rejection_of(path: Path, fragment: str, read: Callable[[], object]) -> str:
    """The message of the CheckpointError of `read`: one line about `path` with `fragment`."""
    with pytest.raises(CheckpointError) as caught:
        read()
    message = str(caught.value)
    assert caught.value.path == path and message.startswith(f"{path}: ")
    assert (
        len(message.splitlines()) == 1
        and message.endswith(".")
        and len(message) < 1000 + len(str(path))
    )
    assert message.isprintable()
    assert fragment in message
    return message


def by_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes, from the two readers of the safetensors package."""
    data = {name: bytes(tensor["data"]) for name, tensor in deserialize(path.read_bytes())}
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {
            name: (s.get_dtype(), tuple(s.get_shape()), data[name]) for name, s in slices.items()
        }


def by_us(tensors: dict[str, TensorInfo]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, info in tensors.items():
        with open(info.file, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.nbytes)
        assert name == info.name and len(data) == info.nbytes
        found[name] = (info.dtype, info.shape, data)
    return found
