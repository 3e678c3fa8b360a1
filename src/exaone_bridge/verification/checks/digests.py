"""SHA-256 digests of tensors, which are equal exactly if dtype, shape and every bit are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exaone_bridge.checkpoint.hf.headers import TensorInfo, read_headers
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["Digest", "digest_folder", "digest_tensors"]

_PIECE = 1 << 22  # bytes that are read at a time


@dataclass(frozen=True, slots=True)
class Digest:
    """A tensor without its values; `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def to_dict(self) -> JSONObject:
        """Return the digest as the JSON report has it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


def digest_folder(folder: Path) -> dict[str, Digest]:
    """Digest every tensor of a Hugging Face folder, whatever files they are in.

    Returns:
        Name -> digest.

    Raises:
        CheckpointError: a folder that cannot be read.
    """
    return digest_tensors(read_headers(folder))


def digest_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, Digest]:
    """Digest tensors on disk, file by file in the order of their bytes.

    Returns:
        Name -> digest.

    Raises:
        CheckpointError: a file has changed since its header was read.
    """
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
