"""How bytes of files come into parameters: read in one piece, or copied from a view; files that shrink meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.checkpoint.hf import maps
from exaone_bridge.checkpoint.hf.maps import TensorMaps
from exaone_bridge.checkpoint.hf.source import HFSource, open_source
from exaone_bridge.checkpoint.reshard import load as engine
from exaone_bridge.checkpoint.reshard.plan import Rank
from exaone_bridge.errors import CheckpointError
from exaone_bridge.schema.parallel_layout import Layout


@pytest.fixture
def source(tiny: Any) -> HFSource:
    return open_source(tiny("exaone4"))


def unfilled(source: HFSource, tp: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The first rank's parameters, with what the file does not have in them."""
    plan = source.plan(Layout(tp=tp))
    return [
        (held, torch.full(held.cut.shape, float("nan"), dtype=dtype)) for held in plan.held(Rank())
    ]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many copies went which way."""
    found = {"read": 0, "copied": 0}
    read, copy = TensorMaps.read, engine._copy

    def reading(self: TensorMaps, *args: Any) -> None:
        found["read"] += 1
        read(self, *args)

    def copying(*args: Any) -> None:
        found["copied"] += 1
        copy(*args)

    monkeypatch.setattr(TensorMaps, "read", reading)
    monkeypatch.setattr(engine, "_copy", copying)
    return found


def right(pairs: list[Any], source: HFSource, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the parameters have the rectangles of the plan, as safetensors reads them; and padding is zero."""
    weights = load_file(source.folder / "model.safetensors")
    for held, parameter in pairs:
        wanted = torch.zeros_like(parameter)
        for copy in held.cut.copies:
            weight = weights[held.part.row.hf[copy.tensor].numbered(*held.numbers).name].to(dtype)
            target = wanted[tuple(slice(*ends) for ends in copy.megatron)]
            target.copy_(weight[tuple(slice(*ends) for ends in copy.hf)].reshape(target.shape))
        if not torch.equal(parameter, wanted):
            return False
    return True


@pytest.mark.parametrize(
    ("tp", "dtype"), [(1, torch.float32), (4, torch.float32), (1, torch.bfloat16)], ids=str
)
def test_what_lies_in_one_piece_is_read(
    tp: int, dtype: torch.dtype, source: HFSource, taken: dict[str, int]
) -> None:
    pairs = unfilled(source, tp, dtype)
    engine.fill(pairs, source.tensors)
    assert right(pairs, source, dtype)
    columns = sum(held.part.row.kind == "row" for held, _ in pairs)  # cut across their rows
    copies = sum(len(held.cut.copies) for held, _ in pairs)
    assert columns == 16 and taken["copied"] == (
        copies if dtype != torch.float32 else columns if tp > 1 else 0
    )
    assert taken["read"] + taken["copied"] == copies


def test_reads_that_end_early_go_on(source: HFSource, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    monkeypatch.setattr(
        maps.os, "preadv", lambda file, views, at: read(file, [views[0][:1000]], at)
    )
    pairs = unfilled(source, 1)
    engine.fill(pairs, source.tensors)
    assert right(pairs, source)


SHRUNK: dict[str, Callable[[int], int]] = {
    "empty": lambda size: 0,
    "cut": lambda size: size - 1,
    "half": lambda size: size // 2,
}


@pytest.mark.parametrize("name", SHRUNK)
def test_a_file_that_has_shrunk_since_its_header_was_read(
    name: str, source: HFSource, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((source.folder / path.name).read_bytes())
    tensors = {key: info._replace(file=path) for key, info in source.tensors.items()}
    os.truncate(path, SHRUNK[name](path.stat().st_size))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: ends within .*; download or copy it again\.$"
    ):
        engine.fill(unfilled(source, 1), tensors)


def test_a_file_that_shrinks_while_it_is_read(source: HFSource, tmp_path: Path) -> None:
    """A view of what is gone would end the process."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((source.folder / path.name).read_bytes())
    info = max(source.tensors.values(), key=lambda info: info.offset)._replace(file=path)
    with TensorMaps() as opened:
        target = torch.zeros(opened.view(info).shape)
        opened.read(info, 0, target)
        os.truncate(path, info.offset + info.nbytes // 2)
        with pytest.raises(CheckpointError, match="ends within"):
            opened.read(info, 0, target)


def test_files_are_closed(source: HFSource) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    engine.fill(unfilled(source, 2), source.tensors)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
