"""Digests of tensors: what is on disk, and what comes out of a stream, read once and never held whole.

Two tensors are the same bit by bit exactly if type, shape and SHA-256 of their bytes are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.headers import TensorInfo, read_headers

__all__ = ["Digest", "digest_folder", "digest_stream"]

_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Digest:
    """A tensor without its values; `dtype` in safetensors' spelling."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


def digest_folder(folder: Path) -> dict[str, Digest]:
    """Name -> digest of every tensor of a Hugging Face folder, however it is cut into files.

    Raises:
        CheckpointError: a folder that cannot be read.
    """
    return digest_tensors(read_headers(folder))


def digest_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, Digest]:
    """Name -> digest, read file by file in the order of the bytes."""
    found: dict[str, Digest] = {}
    buffer = memoryview(bytearray(_PIECE))
    for path in sorted({tensor.file for tensor in tensors.values()}):
        inside = sorted(
            (tensor for tensor in tensors.values() if tensor.file == path),
            key=lambda each: each.offset,
        )
        with path.open("rb", buffering=0) as file:
            for tensor in inside:
                file.seek(tensor.offset)
                digest, left = hashlib.sha256(), tensor.nbytes
                while left:
                    count = file.readinto(buffer[: min(left, _PIECE)])
                    if not count:
                        raise OSError(f"{path}: ended while it was read")
                    digest.update(buffer[:count])
                    left -= count
                found[tensor.name] = Digest(tensor.dtype, tensor.shape, digest.hexdigest())
    return found


def digest_stream(weights: Iterable[tuple[str, Any]]) -> dict[str, Digest]:
    """Name -> digest of (name, torch tensor), each forgotten before the next."""
    import torch

    spelled = {
        torch.float32: "F32",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float64: "F64",
        torch.int64: "I64",
        torch.int32: "I32",
    }
    found: dict[str, Digest] = {}
    for name, tensor in weights:
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy() if flat.numel() else b""
        found[name] = Digest(
            spelled[tensor.dtype], tuple(tensor.shape), hashlib.sha256(data).hexdigest()
        )
    return found
