"""The one reader of weights: slices read or copied from a view, and files that change meanwhile."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.checkpoint.hf import reader as module
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_headers
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.checkpoint.megatron.torch_dist_write import parameters_of, write_parameters
from exaone_bridge.checkpoint.reshard import load
from exaone_bridge.checkpoint.reshard.plan import Rank, reshard_plan
from exaone_bridge.convert.extra_tensors import write_passthrough
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.digests import digest_tensors


@pytest.fixture
def checkpoint(tiny: Any) -> HFCheckpoint:
    return HFCheckpoint.open(tiny("exaone4"))


def unfilled(
    checkpoint: HFCheckpoint, tp: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Any, torch.Tensor]]:
    """The first rank's parameters, filled with what the files do not have."""
    plan = reshard_plan(checkpoint.model, Layout(tp=tp))
    return [
        (local, torch.full(local.shard.shape, float("nan"), dtype=dtype))
        for local in plan.local_params(Rank())
    ]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many slices were read, and how many were copied from a view."""
    found = {"read": 0, "copied": 0}
    read, copy = TensorReader.read_into, load._copy

    def reading(self: TensorReader, *args: Any) -> None:
        found["read"] += 1
        read(self, *args)

    def copying(*args: Any) -> None:
        found["copied"] += 1
        copy(*args)

    monkeypatch.setattr(TensorReader, "read_into", reading)
    monkeypatch.setattr(load, "_copy", copying)
    return found


def is_filled(
    pairs: list[Any], checkpoint: HFCheckpoint, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether the parameters have the slices of the plan, as safetensors reads them, else zero."""
    weights = load_file(checkpoint.folder / "model.safetensors")
    for local, parameter in pairs:
        expected = torch.zeros_like(parameter)
        for copy in local.shard.copies:
            tensor = local.param.mapping.hf[copy.tensor].numbered(*local.indices)
            weight = weights[tensor.name].to(dtype)
            target = expected[tuple(slice(*ends) for ends in copy.megatron)]
            target.copy_(weight[tuple(slice(*ends) for ends in copy.hf)].reshape(target.shape))
        if not torch.equal(parameter, expected):
            return False
    return True


@pytest.mark.parametrize(
    ("tp", "dtype"), [(1, torch.float32), (4, torch.float32), (1, torch.bfloat16)], ids=str
)
def test_contiguous_slices_are_read(
    tp: int, dtype: torch.dtype, checkpoint: HFCheckpoint, counts: dict[str, int]
) -> None:
    pairs = unfilled(checkpoint, tp, dtype)
    load.fill_params(pairs, checkpoint.tensors)
    assert is_filled(pairs, checkpoint, dtype)
    row_parallel = sum(local.param.mapping.kind == "row" for local, _ in pairs)
    copies = sum(len(local.shard.copies) for local, _ in pairs)
    strided = row_parallel if tp > 1 else 0
    assert row_parallel == 16
    assert counts["copied"] == (strided if dtype == torch.float32 else copies)
    assert counts["read"] + counts["copied"] == copies


def test_short_reads_go_on(checkpoint: HFCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(
        module.os, "preadv", lambda file, views, at: read(file, [views[0][:1000]], at)
    )
    pairs = unfilled(checkpoint, 1)
    load.fill_params(pairs, checkpoint.tensors)
    assert is_filled(pairs, checkpoint)


def test_read_view_and_read_into_agree(checkpoint: HFCheckpoint) -> None:
    weights = load_file(checkpoint.folder / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(checkpoint.read(name), weight)
        assert torch.equal(checkpoint.view(name), weight)
        checkpoint.release(name)
        half = torch.empty(weight.numel() // 2, dtype=weight.dtype)
        checkpoint.read_into(name, half, weight.nbytes - half.nbytes)
        assert torch.equal(half, weight.flatten()[-half.numel() :])
        content = bytearray(half.nbytes)
        checkpoint.read_into(name, memoryview(content), weight.nbytes - half.nbytes)
        assert content == half.numpy().tobytes()
    with pytest.raises(ValueError, match="has 256 bytes, not 260"):
        checkpoint.read_into("model.norm.weight", torch.empty(1), 256)


def test_every_dtype_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES

    raw = torch.arange(16, dtype=torch.uint8) % 2
    tensors = {name: raw.clone().view(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader()
    for name, info in read_headers(tmp_path).items():
        for found in (reader.read(info), reader.view(info)):
            assert found.dtype == tensors[name].dtype and found.shape == tensors[name].shape
            if found.numel():
                flat = found.reshape(-1).view(torch.uint8)
                assert torch.equal(flat, tensors[name].reshape(-1).view(torch.uint8))


# --- files that change after their headers were read ------------------------------------------


def last(checkpoint: HFCheckpoint) -> str:
    return max(checkpoint.tensors.values(), key=lambda info: info.offset).name


def write_torch_dist(checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    plan = reshard_plan(checkpoint.model, Layout())
    parameters = parameters_of(plan, checkpoint.model_config.num_layers, stacked=True)
    list(write_parameters(parameters, range(len(parameters)), checkpoint, tmp_path / "parameters"))


def keep_as_passthrough(checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    checkpoint.passthrough.update(checkpoint.tensors)  # type: ignore[attr-defined]
    write_passthrough(checkpoint, tmp_path)


READERS: dict[str, Callable[[HFCheckpoint, Path], object]] = {
    "HFCheckpoint.read": lambda checkpoint, _: checkpoint.read(last(checkpoint)),
    "HFCheckpoint.view": lambda checkpoint, _: checkpoint.view(last(checkpoint)),
    "a planned load": lambda checkpoint, _: load.fill_params(
        unfilled(checkpoint, 1), checkpoint.tensors
    ),
    "import": write_torch_dist,
    "passthrough tensors of import": keep_as_passthrough,
    "digests of verify": lambda checkpoint, _: digest_tensors(checkpoint.tensors),
    "layer-wise verify": lambda checkpoint, _: checkpoint.read(last(checkpoint)),
}


def rewrite(path: Path, size: int) -> None:
    """Other bytes, of the same size."""
    path.write_bytes(bytes(size))
    os.utime(path, ns=(0, 0))


CHANGES: dict[str, Callable[[Path, int], object]] = {
    "truncated to nothing": lambda path, size: os.truncate(path, 0),
    "truncated by one byte": lambda path, size: os.truncate(path, size - 1),
    "truncated to half": lambda path, size: os.truncate(path, size // 2),
    "rewritten": rewrite,
    "replaced": lambda path, size: (path.unlink(), rewrite(path, size)),
    "deleted": lambda path, size: path.unlink(),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_file_raises_in_every_reader(
    change: str, name: str, checkpoint: HFCheckpoint, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint.folder, tmp_path / "model")
    copied = HFCheckpoint.open(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    CHANGES[change](path, path.stat().st_size)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: (has changed|cannot be opened).*its header"
    ):
        READERS[name](copied, tmp_path)


def test_file_that_shrinks_between_two_reads(checkpoint: HFCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copyfile(checkpoint.folder / path.name, path)
    info = max(read_headers(tmp_path).values(), key=lambda info: info.offset)
    with TensorReader() as reader:
        target = torch.zeros(reader.view(info).shape)
        reader.read_into(info, target)
        os.truncate(path, info.offset + info.nbytes // 2)
        for read in (
            lambda: reader.read_into(info, target),
            lambda: reader.view(info),
            lambda: reader.release(info),
        ):
            with pytest.raises(CheckpointError, match="has changed since its header was read"):
                read()


def test_files_are_closed(checkpoint: HFCheckpoint) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    load.fill_params(unfilled(checkpoint, 2), checkpoint.tensors)
    reader = TensorReader()
    reader.read(checkpoint.tensors[last(checkpoint)])
    del reader
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_pickled_reader_opens_files_for_itself(checkpoint: HFCheckpoint) -> None:
    info = checkpoint.tensors[last(checkpoint)]
    expected = checkpoint.read(info.name)
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint.reader)).read(info), expected)
