"""The reader of torch_dist checkpoints, over what torch writes itself."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint

from exaone_bridge.checkpoint.megatron import torch_dist


class _ShortReads(io.FileIO):
    """A file that reads at most 1000 bytes at once; Linux reads at most 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:1000])


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(30_000, dtype=torch.int32).view(100, 300)
    checkpoint.save({"first": tensor + 1, "second": tensor}, checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.storage_meta = None  # torch's has a Path, and Megatron-Core's a string
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    stored = torch_dist.TorchDist(tmp_path)
    opened = Path.open

    @contextlib.contextmanager
    def short(path: Path, *args: Any, **options: Any) -> Iterator[Any]:
        with opened(path, *args, **options) if path.suffix != ".distcp" else _ShortReads(path) as f:
            yield f

    monkeypatch.setattr(Path, "open", short)
    target = torch.zeros(90, 300, dtype=torch.int32)
    stored.read_into(target, "second", (), ((10, 100), (0, 300)))
    assert torch.equal(target, tensor[10:])
