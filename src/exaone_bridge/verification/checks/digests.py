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
from exaone_bridge.checkpoint.hf.reader import TensorReader

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
    import torch

    found: dict[str, Digest] = {}
    buffer = torch.empty(_PIECE, dtype=torch.uint8)
    with TensorReader() as reader:
        for tensor in sorted(tensors.values(), key=lambda each: (each.file, each.offset)):
            digest = hashlib.sha256()
            for begin in range(0, tensor.nbytes, _PIECE):
                piece = buffer[: min(_PIECE, tensor.nbytes - begin)]
                reader.read_into(tensor, piece, begin)
                digest.update(piece.numpy())
            found[tensor.name] = Digest(tensor.dtype, tensor.shape, digest.hexdigest())
    return found


def digest_stream(weights: Iterable[tuple[str, Any]]) -> dict[str, Digest]:
    """Name -> digest of (name, torch tensor), each forgotten before the next."""
    import torch

    from exaone_bridge.checkpoint.dtypes import SAFETENSORS_NAMES

    found: dict[str, Digest] = {}
    for name, tensor in weights:
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy() if flat.numel() else b""
        found[name] = Digest(
            SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape), hashlib.sha256(data).hexdigest()
        )
    return found
