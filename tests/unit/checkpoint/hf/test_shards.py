"""The one writer of safetensors files, and what is written beside them."""

from __future__ import annotations

import json
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exaone_bridge.checkpoint.dtypes import SAFETENSORS_NAMES, TORCH_DTYPES, byte_view
from exaone_bridge.checkpoint.hf import shards
from exaone_bridge.checkpoint.hf.headers import (
    TensorSpec,
    read_file_header,
    read_headers,
    read_json,
)
from exaone_bridge.checkpoint.hf.shards import ShardWriter, assign_files, shard_layout, write_index
from exaone_bridge.checkpoint.hf.tiny import random_weights
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.models.exaone4 import EXAONE4

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODE = stat.S_IMODE


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=40).map(
    lambda sizes: {f"t{n}": s for n, s in enumerate(sizes)}
)


@given(sizes=SIZES, maximum=st.integers(1, 120))
def test_files_have_every_tensor_in_order_and_at_most_the_maximum(
    sizes: dict[str, int], maximum: int
) -> None:
    files = assign_files(sizes, maximum)
    assert list(files) == list(sizes)
    shards = list(dict.fromkeys(files.values()))
    assert list(files.values()) == [
        shard for shard in shards for name in sizes if files[name] == shard
    ]
    total = [sum(sizes[name] for name in sizes if files[name] == shard) for shard in shards]
    for shard, size in zip(shards, total, strict=True):
        not_empty = [name for name in sizes if files[name] == shard and sizes[name] > 0]
        assert size <= maximum or len(not_empty) == 1
    firsts = [next(sizes[name] for name in sizes if files[name] == shard) for shard in shards]
    for earlier, first in zip(total, firsts[1:], strict=False):
        assert earlier + first > maximum  # a shard ends only where the next tensor would not fit
    count = len(shards)
    wanted = (
        [SINGLE]
        if count == 1
        else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    )
    assert shards == wanted


def test_files_at_the_edge() -> None:
    assert assign_files({"a": 5, "b": 5}, 10) == {"a": SINGLE, "b": SINGLE}
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert assign_files({"a": 5, "b": 5}, 9) == {"a": one, "b": two}
    assert assign_files({"a": 50, "b": 5}, 9) == {"a": one, "b": two}
    assert assign_files({"a": 4 * 10**9, "b": 10**9}) == {"a": SINGLE, "b": SINGLE}
    assert assign_files({"a": 4 * 10**9, "b": 10**9 + 1}) == {"a": one, "b": two}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Those of the tiny hybrid model."""
    model = EXAONE4.describe(EXAONE4.tiny["exaone4"])
    return dict(random_weights(model.hf_tensors.values(), model.dims, "float32", 7))


def in_three_files(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    files = assign_files({name: tensor.nbytes for name, tensor in weights.items()}, 500_000)
    assert len(set(files.values())) == 3
    return files


def write(folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, str] | str) -> None:
    """Write contiguous tensors, the last first, and the index."""
    specs = [
        TensorSpec(name, SAFETENSORS_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    layout = shard_layout(specs, files)
    with ShardWriter.create(folder, layout) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.put(name, [byte_view(tensor)])
    write_index(folder, layout)


def test_shards_and_index_read_back(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    files = in_three_files(weights)
    write(tmp_path, weights, files)
    assert names_in(tmp_path) == sorted([*set(files.values()), INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    total = sum(tensor.nbytes for tensor in weights.values())
    assert index == {"metadata": {"total_size": total}, "weight_map": files}
    assert {name: info.file.name for name, info in read_headers(tmp_path).items()} == files
    loaded = {
        name: tensor
        for file in set(files.values())
        for name, tensor in load_file(tmp_path / file).items()
    }
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_transformers_loads_shards(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write(tmp_path, weights, in_three_files(weights))
    write_config_json(tmp_path, EXAONE4.tiny["exaone4"])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("file", [SINGLE, "model-00001-of-00001.safetensors"])
def test_one_file_has_an_index_unless_it_has_the_usual_name(
    file: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write(tmp_path, weights, file)
    assert names_in(tmp_path) == ([file] if file == SINGLE else [file, INDEX])
    assert read_headers(tmp_path).keys() == weights.keys()


def test_written_file_is_that_of_safetensors(tmp_path: Path) -> None:
    """Byte for byte: every dtype, a scalar, an empty tensor, names that JSON escapes."""
    raw = torch.arange(16, dtype=torch.uint8) % 2
    tensors = {f"t.{name}": raw.clone().view(dtype) for name, dtype in TORCH_DTYPES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3), "é 😀": torch.ones(2, 3)}
    write(tmp_path, tensors, SINGLE)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "expected").read_bytes()
    write(tmp_path, {}, SINGLE)
    assert read_file_header(tmp_path / SINGLE) == ({}, {"format": "pt"})


def test_files_have_the_permissions_of_other_files(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(1)}, SINGLE)
    write_config_json(tmp_path, {})
    modes = [MODE((tmp_path / name).stat().st_mode) for name in (SINGLE, "config.json")]
    assert modes[0] == modes[1]


def test_config_is_written_as_save_pretrained_writes_it(tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_config_json(tmp_path, EXAONE4.tiny["exaone4"])
    written = (tmp_path / "config.json").read_text()
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "transformers")
    assert written == (tmp_path / "transformers" / "config.json").read_text()
    write_config_json(tmp_path, {**EXAONE4.tiny["exaone4"], "transformers_version": "4.54.0"})
    assert read_json(tmp_path / "config.json")["transformers_version"] == "4.54.0"


def test_writer_resumes_and_replaces(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (2,)), TensorSpec("b", "BF16", (3,))]
    layout = shard_layout(specs, {"a": SINGLE, "b": SINGLE})
    with pytest.raises(ValueError, match="a has 8 bytes, and 4 were given"):
        ShardWriter.create(tmp_path, layout).put("a", [memoryview(bytes(4))])
    a, b = torch.ones(2), torch.ones(3, dtype=torch.bfloat16)
    for second, (kept, written) in ((b, (0, 14)), (b, (14, 0)), (2 * b, (8, 6))):
        with ShardWriter.create(tmp_path, layout) as writer:
            writer.put("b", [byte_view(second[:1]), byte_view(second[1:])])
            writer.put("a", [byte_view(a)])
        assert (writer.kept_bytes, writer.written_bytes) == (kept, written)
        assert torch.equal(load_file(tmp_path / SINGLE)["b"], second)
    write_index(tmp_path, layout)
    assert names_in(tmp_path) == [SINGLE]


STEP = 4 << 20  # bytes that a resumed export compares at once


@pytest.mark.parametrize("piece", [STEP, 2 * STEP + 4], ids=["a piece of a step", "one piece"])
@pytest.mark.parametrize("wrong", [0, STEP - 1, STEP, 2 * STEP - 1, 2 * STEP, 2 * STEP + 3])
def test_a_byte_that_differs_is_written_in_a_tensor_longer_than_a_step(
    wrong: int, piece: int, tmp_path: Path
) -> None:
    nbytes = 2 * STEP + 4
    layout = shard_layout([TensorSpec("a", "U8", (nbytes,)), TensorSpec("b", "U8", (3,))], SINGLE)
    tensor = torch.arange(nbytes, dtype=torch.int32).to(torch.uint8)
    view = byte_view(tensor)
    pieces = [view[begin : begin + piece] for begin in range(0, nbytes, piece)]
    for kept in (0, nbytes, 0):
        with ShardWriter.create(tmp_path, layout) as writer:
            writer.put("a", pieces)
        assert (writer.kept_bytes, writer.written_bytes) == (kept, nbytes - kept)
        assert torch.equal(load_file(tmp_path / SINGLE)["a"], tensor)
        tensor[wrong] ^= 1 if kept else 0


@pytest.mark.parametrize("longest", [1, 5, None], ids=["a byte", "five bytes", "as asked"])
def test_a_tensor_of_more_pieces_than_one_write_takes(
    longest: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux takes 1024 pieces at once, and may write fewer bytes than it was given."""
    tensor = torch.arange(4000, dtype=torch.int32).to(torch.uint8)
    ends = [*(3 * number // 2 for number in range(2000)), 2999, 4000]
    view = byte_view(tensor)
    pieces = [view[begin:end] for begin, end in pairwise(ends)]
    layout = shard_layout([TensorSpec("a", "U8", (4000,)), TensorSpec("b", "U8", (3,))], SINGLE)
    write = os.pwritev

    def short_write(descriptor: int, buffers: list[memoryview], position: int) -> int:
        data = b"".join(buffers)[:longest]
        return write(descriptor, [data] if longest else buffers, position)

    monkeypatch.setattr(shards.os, "pwritev", short_write)
    for kept in (0, 4000):
        with ShardWriter.create(tmp_path, layout) as writer:
            writer.put("a", pieces)
        assert writer.kept_bytes == kept
        found = load_file(tmp_path / SINGLE)
        assert torch.equal(found["a"], tensor) and found["b"].tolist() == [0, 0, 0]
