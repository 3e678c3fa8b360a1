"""The checks of tensors, config and files: equal folders pass, and every difference fails."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exaone_bridge.errors import CheckpointError
from exaone_bridge.verification.checks import digests
from exaone_bridge.verification.checks.digests import Digest, digest_folder
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_digests,
    compare_files,
    compare_tensors,
)
from exaone_bridge.verification.report.report import Check

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN = "model.layers.3.mlp.down_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pair(tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two equal folders."""
    for name in ("left", "right"):
        shutil.copytree(tiny("exaone4"), tmp_path / name)
    return tmp_path / "left", tmp_path / "right"


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def into_shards(folder: Path) -> None:
    """The same tensors in two files, in another order."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {
        name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        save_file(
            {name: tensor for name, tensor in tensors.items() if weight_map[name] == file},
            folder / file,
        )
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# --- tensors --------------------------------------------------------------------------------------


def test_equal_tensors_pass(pair: tuple[Path, Path]) -> None:
    left, right = pair
    assert compare_tensors(left, right) == Check("tensors", "91 tensors bitwise equal", True)
    assert compare_tensors(left, left).passed


def test_the_shards_of_the_files_do_not_matter(pair: tuple[Path, Path]) -> None:
    left, right = pair
    into_shards(right)
    assert compare_tensors(left, right).passed and compare_tensors(right, left).passed
    into_shards(left)
    assert compare_tensors(left, right).passed


def test_nan_equals_itself_bit_by_bit(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        change(folder, lambda tensors: tensors[DOWN].fill_(float("nan")))
    assert compare_tensors(*pair).passed
    change(
        pair[1], lambda tensors: tensors[DOWN].view(torch.int32).add_(1)
    )  # NaN too, of another payload
    assert not compare_tensors(*pair).passed


def test_minus_zero_is_not_zero(pair: tuple[Path, Path]) -> None:
    change(pair[0], lambda tensors: tensors[DOWN].fill_(0.0))
    change(pair[1], lambda tensors: tensors[DOWN].fill_(-0.0))
    assert not compare_tensors(*pair).passed


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("where", ["first bit", "middle", "last bit"])
def test_one_flipped_bit_fails(where: str, sharded: bool, pair: tuple[Path, Path]) -> None:
    def flip(tensors: Tensors) -> None:
        data = tensors[DOWN].view(torch.uint8).flatten()
        index, bit = {
            "first bit": (0, 1),
            "middle": (len(data) // 2, 16),
            "last bit": (len(data) - 1, 128),
        }[where]
        data[index] ^= bit

    change(pair[1], flip)
    if sharded:
        into_shards(pair[0])
    check = compare_tensors(*pair)
    assert check == Check("tensors", "1 of 91 tensors differ", False, f"{DOWN} differs")
    assert not compare_tensors(*reversed(pair)).passed


@pytest.mark.parametrize("piece", [1, 7, 100, 4096])
def test_a_bit_is_seen_wherever_the_pieces_end(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tensors are read piece by piece; here the pieces are small."""
    monkeypatch.setattr(digests, "_PIECE", piece)
    tensors = {"a": torch.arange(1000, dtype=torch.int64), "b": torch.zeros(0), "c": torch.ones(3)}
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / SINGLE)
    for index in (0, 6, 7, 99, 100, 4095, 4096, 7999):
        data = tensors["a"].clone()
        data.view(torch.uint8)[index] ^= 1
        save_file(tensors | {"a": data}, tmp_path / "right" / SINGLE)
        left, right = (digest_folder(tmp_path / name) for name in ("left", "right"))
        assert {name: left[name] == right[name] for name in tensors} == {
            "a": False,
            "b": True,
            "c": True,
        }


def test_a_digest_is_that_of_the_bytes(tiny: Any) -> None:
    folder = tiny("ernie45", dtype="bfloat16")
    tensors = load_file(folder / SINGLE)
    read = digest_folder(folder)
    one = tensors[DOWN.replace("mlp", "mlp.experts.0")]
    digest = hashlib.sha256(one.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert read[DOWN.replace("mlp", "mlp.experts.0")] == Digest("BF16", tuple(one.shape), digest)


def retype(tensors: Tensors) -> None:
    tensors[DOWN] = tensors[DOWN].view(torch.int32)  # the same bytes


def reshape(tensors: Tensors) -> None:
    tensors[DOWN] = tensors[DOWN].reshape(96, 64)  # the same bytes


TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], object], int, str]] = {
    "missing": (lambda tensors: tensors.pop(DOWN), 1, f"{DOWN} is missing"),
    "added": (lambda tensors: tensors.update({"new": torch.ones(1)}), 1, "new was added"),
    "renamed": (
        lambda tensors: tensors.update({"new": tensors.pop(DOWN)}),
        2,
        f"{DOWN} is missing; new was added",
    ),
    "other dtype": (retype, 1, f"{DOWN} is F32 [64, 96], then I32 [64, 96]"),
    "rounded": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN].bfloat16()}),
        1,
        f"{DOWN} is F32 [64, 96], then BF16 [64, 96]",
    ),
    "other shape": (reshape, 1, f"{DOWN} is F32 [64, 96], then F32 [96, 64]"),
    "one axis more": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN][None]}),
        1,
        f"{DOWN} is F32 [64, 96], then F32 [1, 64, 96]",
    ),
    "swapped": (
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.k_proj.weight": tensors[
                    "model.layers.0.self_attn.v_proj.weight"
                ],
                "model.layers.0.self_attn.v_proj.weight": tensors[
                    "model.layers.0.self_attn.k_proj.weight"
                ].clone(),
            }
        ),
        2,
        "model.layers.0.self_attn.k_proj.weight differs; "
        "model.layers.0.self_attn.v_proj.weight differs",
    ),
}


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_a_tensor_that_differs_is_named(name: str, pair: tuple[Path, Path]) -> None:
    fault, count, where = TENSOR_FAULTS[name]
    change(pair[1], fault)
    total = 92 if "new was added" in where else 91
    summary = f"{count} of {total} tensors differ"
    assert compare_tensors(*pair) == Check("tensors", summary, False, where)
    assert not compare_tensors(*reversed(pair)).passed


def test_many_differences_are_counted_and_a_few_named(pair: tuple[Path, Path]) -> None:
    change(pair[1], lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    check = compare_tensors(*pair)
    assert check.summary == "91 of 91 tensors differ" and len(check.details.split("; ")) == 5


def test_no_more_tensors_differ_than_there_are() -> None:
    """Two models without a common name."""
    first, second = ({f"{end}.{n}": Digest("F32", (1,), "0") for n in range(3)} for end in "ab")
    assert compare_digests(first, second).summary == "6 of 6 tensors differ"


def test_tensors_that_cannot_be_read_raise(pair: tuple[Path, Path]) -> None:
    (pair[1] / SINGLE).write_bytes((pair[1] / SINGLE).read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        compare_tensors(*pair)


# --- configurations -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=50)
@given(config=st.dictionaries(st.text(max_size=4), JSON, max_size=6))
def test_equal_configs_pass_in_any_order(config: dict[str, Any]) -> None:
    shuffled = json.loads(json.dumps(dict(reversed(config.items()))))
    check = compare_configs(config, shuffled)
    assert (
        check.passed
        and check.summary == f"{len(config.keys() - {'transformers_version'})} keys equal"
    )


def test_the_transformers_version_does_not_count() -> None:
    assert compare_configs(
        {"a": 1, "transformers_version": "5.0"}, {"a": 1, "transformers_version": "5.1"}
    ).passed
    assert compare_configs({"a": 1}, {"a": 1, "transformers_version": "5.1"}) == Check(
        "config", "1 keys equal", True
    )


@pytest.mark.parametrize(
    ("left", "right", "where"),
    [
        ({"a": 1}, {"a": 2}, "a: 1, then 2"),
        ({"a": 1}, {}, "a: 1, then '(absent)'"),
        ({}, {"a": 1}, "a: '(absent)', then 1"),
        ({}, {"a": None}, "a: '(absent)', then None"),
        ({"a": None}, {}, "a: None, then '(absent)'"),
        ({"a": None}, {"a": False}, "a: None, then False"),
        ({"a": "1"}, {"a": 1}, "a: '1', then 1"),
        ({"a": [1, 2]}, {"a": [2, 1]}, "a: [1, 2], then [2, 1]"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a: {'b': 1}, then {'b': 2}"),
        ({"a": {"b": 1}}, {"a": {}}, "a: {'b': 1}, then {}"),
        ({"a": "x"}, {"A": "x"}, "A: '(absent)', then 'x'; a: 'x', then '(absent)'"),
    ],
)
def test_a_key_that_differs_is_named(
    left: dict[str, Any], right: dict[str, Any], where: str
) -> None:
    check = compare_configs({"same": 0} | left, right | {"same": 0})
    count = len(left.keys() | right.keys())
    assert check == Check("config", f"{count} of {count + 1} keys differ", False, where)


@pytest.mark.parametrize(
    ("left", "right"), [(1, True), (0, False), (24, 24.0), ([1], [1.0]), ({"a": 1}, {"a": True})]
)
def test_a_value_of_another_type_fails(left: object, right: object) -> None:
    assert not compare_configs({"a": left}, {"a": right}).passed


# --- files ----------------------------------------------------------------------------------------


def test_equal_files_pass(pair: tuple[Path, Path]) -> None:
    assert compare_files(*pair) == Check("files", "4 files equal", True)


def test_no_files_are_equal_files(tmp_path: Path) -> None:
    assert compare_files(tmp_path, tmp_path) == Check("files", "0 files equal", True)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"],
)
@pytest.mark.parametrize("fault", ["changed", "longer", "missing", "emptied"])
def test_a_file_that_differs_is_named(fault: str, name: str, pair: tuple[Path, Path]) -> None:
    path = pair[1] / name
    data = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"changed": data[:-1] + b"X", "longer": data + b"\n", "emptied": b""}[fault]
        )
    for left, right in (pair, pair[::-1]):
        assert compare_files(left, right) == Check("files", "1 of 4 files differ", False, name)


def test_a_file_that_was_added_is_named(pair: tuple[Path, Path]) -> None:
    (pair[1] / "special_tokens_map.json").write_text("{}")
    assert compare_files(*pair) == Check(
        "files", "1 of 5 files differ", False, "special_tokens_map.json"
    )


def test_weights_and_config_are_not_among_the_files(pair: tuple[Path, Path]) -> None:
    (pair[1] / "config.json").write_text("{}")
    (pair[1] / SINGLE).unlink()
    for name, begin in (("adapter.pt", b"PK\x03\x04"), ("model.gguf", b"GGUF")):
        (pair[0] / name).write_bytes(begin + bytes(99))
    (pair[0] / ".cache").mkdir()
    (pair[0] / ".cache" / "download.lock").touch()
    (pair[0] / "checkpoint-5").mkdir()
    for name in ("config.json", "tokenizer.json"):  # another model
        (pair[0] / "checkpoint-5" / name).write_text("{}")
    assert compare_files(*pair).passed


@pytest.mark.parametrize(
    "name", ["LICENSE", "README.md", "tokenization_x.py", "spm.model", "templates/tools.jinja"]
)
def test_any_other_file_that_is_lost_is_named(name: str, pair: tuple[Path, Path]) -> None:
    """Whether or not a conversion copies it: the check has no list of names."""
    (pair[0] / name).parent.mkdir(exist_ok=True)
    (pair[0] / name).write_text("new")
    check = compare_files(*pair)
    assert not check.passed and check.details == name


def test_folders_do_not_count(pair: tuple[Path, Path]) -> None:
    (pair[0] / "tokenizer_old").mkdir()
    assert compare_files(*pair).passed
