"""Outputs that are whole or absent, shards and their index, and random weights that hide nothing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from exaone_bridge.checkpoint.hf.headers import read_file_header, read_headers
from exaone_bridge.checkpoint.hf.tiny import random_weights, write_random
from exaone_bridge.checkpoint.hf.writer import (
    plan_shards,
    write_config_json,
    write_weights,
)
from exaone_bridge.checkpoint.staging import refuse_existing, staged
from exaone_bridge.errors import BridgeError, CheckpointError, UnsupportedConfig
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.hf_files import copy_companion_files
from exaone_bridge.schema.param_mapping import HFTensor, expected_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODE = stat.S_IMODE


def drawn(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """`random_weights` of these shapes: every axis of every tensor has a letter of its own."""
    dims: dict[str, int] = {}
    tensors = []
    for name, shape in shapes.items():
        axes = "".join(chr(0x4E00 + len(dims) + number) for number in range(len(shape)))
        dims |= dict(zip(axes, shape, strict=True))
        tensors.append(HFTensor(name, axes))
    return random_weights(tensors, dims, dtype, seed)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- staged ---------------------------------------------------------------------------------------------------------


def test_staged_takes_the_targets_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "output"
    with staged(target) as folder:
        assert folder.is_dir() and folder.parent == tmp_path and folder != target
        assert folder.name.startswith(".output.partial-") and not any(folder.iterdir())
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"bytes")
        assert not target.exists()
    assert names_in(tmp_path) == ["output", "output/deep", "output/deep/file"]
    assert (target / "deep" / "file").read_bytes() == b"bytes"


def test_staged_takes_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged(Path("output")) as folder:
        (folder / "file").write_text("")
    assert names_in(tmp_path) == ["output", "output/file"]


def stage(target: Path, body: Callable[[Path], object]) -> None:
    with staged(target) as folder:
        body(folder)


def must_not_run(folder: Path) -> None:
    pytest.fail("the body must not run")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a"), KeyboardInterrupt(), SystemExit(1), CheckpointError("a", "b", remedy="c")],
)
def test_staged_leaves_nothing_after_an_exception(error: BaseException, tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        stage(tmp_path / "output", half)
    assert caught.value is error and names_in(tmp_path) == []


@pytest.mark.parametrize(
    "kind", ["folder", "empty folder", "file", "link to a folder", "link to nowhere"]
)
def test_staged_refuses_a_target_that_is_there(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"
    if kind.startswith("link"):
        (tmp_path / "real").mkdir()
        target.symlink_to("real" if kind == "link to a folder" else "nowhere")
    elif kind == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "file").write_text("precious")
    before = names_in(tmp_path)
    with pytest.raises(
        CheckpointError, match="the output exists already; name another folder"
    ) as caught:
        stage(target, must_not_run)
    assert caught.value.path == target and names_in(tmp_path) == before
    assert target.is_symlink() == kind.startswith("link")
    if not kind.startswith(("link", "empty")):
        assert (target if kind == "file" else target / "file").read_text() == "precious"


@pytest.mark.parametrize("parent", ["missing", "a file", "a link to nowhere"])
def test_staged_refuses_a_target_in_no_folder(parent: str, tmp_path: Path) -> None:
    if parent == "a file":
        (tmp_path / "parent").write_text("")
    elif parent == "a link to nowhere":
        (tmp_path / "parent").symlink_to("nowhere")
    before = names_in(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist; create that folder first"):
        stage(tmp_path / "parent" / "output", must_not_run)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "empty folder", "link"])
def test_staged_does_not_replace_a_target_that_came_meanwhile(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "output"

    def meanwhile(folder: Path) -> None:
        if kind == "link":
            target.symlink_to("nowhere")
        else:
            target.mkdir()
        if kind == "folder":
            (target / "file").write_text("precious")

    with pytest.raises(CheckpointError, match="the output exists already"):
        stage(target, meanwhile)
    assert names_in(tmp_path) == (["output", "output/file"] if kind == "folder" else ["output"])
    assert target.is_symlink() == (kind == "link")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_staged_has_the_permissions_of_mkdir(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "mkdir").mkdir()
        with staged(tmp_path / "output") as folder:
            (folder / "file").write_text("")
        assert os.umask(mask) == mask  # and it is left as it was
    finally:
        os.umask(before)
    assert MODE((tmp_path / "output").stat().st_mode) == MODE((tmp_path / "mkdir").stat().st_mode)


def test_two_outputs_can_be_staged_at_once(tmp_path: Path) -> None:
    with staged(tmp_path / "a") as a, staged(tmp_path / "b") as b:
        (a / "of a").write_text("")
        (b / "of b").write_text("")
    assert names_in(tmp_path) == ["a", "a/of a", "b", "b/of b"]


def test_refuse_existing_touches_nothing(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "output")
    assert names_in(tmp_path) == []


# --- plan_shards ----------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=40).map(
    lambda sizes: {f"t{n}": s for n, s in enumerate(sizes)}
)


@given(sizes=SIZES, maximum=st.integers(1, 120))
def test_shards_hold_every_tensor_in_order_and_not_too_much(
    sizes: dict[str, int], maximum: int
) -> None:
    files = plan_shards(sizes, maximum)
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


def test_shards_at_the_edge() -> None:
    assert plan_shards({"a": 5, "b": 5}, 10) == {"a": SINGLE, "b": SINGLE}
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert plan_shards({"a": 5, "b": 5}, 9) == {"a": one, "b": two}
    assert plan_shards({"a": 50, "b": 5}, 9) == {"a": one, "b": two}
    assert plan_shards({"a": 4 * 10**9, "b": 10**9}) == {"a": SINGLE, "b": SINGLE}
    assert plan_shards({"a": 4 * 10**9, "b": 10**9 + 1}) == {"a": one, "b": two}


# --- write_weights --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The hybrid miniature's."""
    model_config = EXAONE4.read_hf_config(EXAONE4.tiny["exaone4"])
    return dict(
        drawn(expected_hf(EXAONE4.mappings(model_config), model_config.dims), torch.float32, 7)
    )


def in_three(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    files = plan_shards({name: tensor.nbytes for name, tensor in weights.items()}, 500_000)
    assert len(set(files.values())) == 3
    return files


def orders(weights: dict[str, torch.Tensor]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    items = list(weights.items())
    yield items
    yield items[::-1]
    yield [
        items[n]
        for n in torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    ]


def test_the_order_of_the_stream_does_not_matter(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    written = []
    for number, stream in enumerate(orders(weights)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_weights(folder, iter(stream), in_three(weights))
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1] == written[2]


def test_shards_and_index_read_back(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    files = in_three(weights)
    write_weights(tmp_path, weights.items(), files)
    assert names_in(tmp_path) == sorted([*set(files.values()), INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": files,
    }
    found = read_headers(tmp_path)
    assert {name: info.file.name for name, info in found.items()} == files
    loaded = {
        name: tensor
        for file in set(files.values())
        for name, tensor in load_file(tmp_path / file).items()
    }
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    for file in set(files.values()):
        assert read_file_header(tmp_path / file)[1] == {"format": "pt"}  # Transformers asks for it


def test_transformers_loads_shards(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_weights(tmp_path, weights.items(), in_three(weights))
    write_config_json(tmp_path, EXAONE4.tiny["exaone4"])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_one_file_has_no_index(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_weights(tmp_path, weights.items(), dict.fromkeys(weights, SINGLE))
    assert names_in(tmp_path) == [SINGLE] and read_headers(tmp_path).keys() == weights.keys()


def test_one_file_of_another_name_has_an_index(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_weights(
        tmp_path, weights.items(), dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    )
    assert names_in(tmp_path) == ["model-00001-of-00001.safetensors", INDEX]
    assert read_headers(tmp_path).keys() == weights.keys()


def test_a_shard_is_written_as_soon_as_it_is_whole(tmp_path: Path) -> None:
    files = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    seen = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("b", "a", "c"):
            yield name, torch.ones(2)
            seen.append(names_in(tmp_path))

    write_weights(tmp_path, stream(), files)
    assert seen == [[], ["1.safetensors"], ["1.safetensors", "2.safetensors"]]


def test_strided_views_and_gradients_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(base[:, ::2].T)
    write_weights(tmp_path, [("a", parameter), ("b", base[1:3])], {"a": SINGLE, "b": SINGLE})
    loaded = load_file(tmp_path / SINGLE)
    assert torch.equal(loaded["a"], base[:, ::2].T) and torch.equal(loaded["b"], base[1:3])


@pytest.mark.parametrize("lost", ["first", "last"])
def test_a_stream_that_ends_early_is_an_error(
    lost: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    files = in_three(weights)
    items = list(weights.items())
    stream = items[1:] if lost == "first" else items[:-1]
    shard = files[items[0 if lost == "first" else -1][0]]
    with pytest.raises(
        RuntimeError, match=f"the stream of weights ended before .*{shard}.* was complete"
    ):
        write_weights(tmp_path, stream, files)
    assert not (tmp_path / shard).exists() and not (tmp_path / INDEX).exists()
    with pytest.raises(RuntimeError):
        write_weights(tmp_path, [], {"a": SINGLE})


def test_a_tensor_that_nobody_expects_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_weights(tmp_path, [("a", torch.ones(1)), ("b", torch.ones(1))], {"a": SINGLE})


def test_shards_have_the_permissions_of_other_files(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_weights(tmp_path, weights.items(), dict.fromkeys(weights, SINGLE))
    write_config_json(tmp_path, EXAONE4.tiny["exaone4"])
    assert MODE((tmp_path / SINGLE).stat().st_mode) == MODE(
        (tmp_path / "config.json").stat().st_mode
    )


def test_config_is_written_as_save_pretrained_writes_it(tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_config_json(tmp_path, {**EXAONE4.tiny["exaone4"], "transformers_version": "0.0"})
    ours = (tmp_path / "config.json").read_text()
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    assert ours == (tmp_path / "theirs" / "config.json").read_text()


def test_what_travels_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    travels = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
    ]
    travels += [
        "merges.txt",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
    ]
    travels += [
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "vocab.txt",
    ]
    stays = [
        "config.json",
        SINGLE,
        INDEX,
        "README.md",
        "modeling_x.py",
        "pytorch_model.bin",
        ".gitattributes",
    ]
    for name in travels + stays:
        (source / name).write_bytes(f"{name}\r\n\0".encode())
    (source / "tokenizer_folder").mkdir()
    assert copy_companion_files(source, target) == sorted(travels)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        name: (source / name).read_bytes() for name in travels
    }


# --- random weights -------------------------------------------------------------------------------------------------

SHAPES = {"norm": (400,), "wide": (30, 500), "tall": (500, 30), "embedding": (387, 64)}


def test_random_weights_are_the_seeds() -> None:
    one, again, other = (dict(drawn(SHAPES, torch.float32, seed)) for seed in (1, 1, 2))
    assert (
        list(one) == list(SHAPES)
        and {name: tuple(tensor.shape) for name, tensor in one.items()} == SHAPES
    )
    assert all(torch.equal(one[name], again[name]) for name in SHAPES)
    assert not any(torch.equal(one[name], other[name]) for name in SHAPES)


def test_random_weights_leave_torchs_own_generator_alone() -> None:
    state = torch.get_rng_state()
    dict(drawn(SHAPES, torch.float32, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_are_away_from_identity_and_keep_the_scale() -> None:
    made = dict(drawn(SHAPES, torch.float32, 0))
    assert made["norm"].mean().item() == pytest.approx(1, abs=0.06)
    assert made["norm"].std().item() == pytest.approx(0.3, abs=0.04)
    for name in ("wide", "tall", "embedding"):
        assert made[name].mean().item() == pytest.approx(0, abs=0.01)
        assert (made[name].std() * SHAPES[name][1] ** 0.5).item() == pytest.approx(1, abs=0.03)
    assert not torch.equal(made["wide"].flatten(), made["tall"].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_weights_are_rounded_from_the_same_numbers(dtype: torch.dtype) -> None:
    whole, rounded = (dict(drawn(SHAPES, kind, 0)) for kind in (torch.float32, dtype))
    assert all(torch.equal(whole[name].to(dtype), rounded[name]) for name in SHAPES)


def test_write_random_writes_all_or_nothing(tmp_path: Path) -> None:
    config = EXAONE4.tiny["exaone4-1.2b"]
    write_random(tmp_path / "a", config, seed=3)
    assert names_in(tmp_path / "a") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        SINGLE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        write_random(tmp_path / "a", config, seed=4)
    with pytest.raises(UnsupportedConfig, match="num_hidden_layers"):
        write_random(tmp_path / "b", {**config, "num_hidden_layers": 0})
    with pytest.raises(BridgeError, match="architectures"):
        write_random(tmp_path / "b", {**config, "architectures": ["GPT2LMHeadModel"]})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    write_random(tmp_path / "c", config, seed=3, tokenizer=False)
    assert names_in(tmp_path / "c") == ["config.json", SINGLE]
    assert (tmp_path / "c" / SINGLE).read_bytes() == before[SINGLE]


def test_a_miniature_fills_exactly_what_the_rows_claim(tmp_path: Path) -> None:
    for name, config in EXAONE4.tiny.items():
        write_random(tmp_path / name, config)
        model_config = EXAONE4.read_hf_config(config)
        with safe_open(tmp_path / name / SINGLE, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
        assert shapes == expected_hf(EXAONE4.mappings(model_config), model_config.dims)
