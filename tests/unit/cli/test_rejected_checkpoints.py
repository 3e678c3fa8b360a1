"""`import` and `export` reject damaged checkpoints, and read the weights that they checked."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.cli import Cli, Rejected, Snapshot, arguments_of
from tests.helpers.damage import INDEX, WEIGHTS, Damage


def test_export_of_an_empty_folder_is_rejected(
    megatron_bridge: Any, tmp_path: Path, rejected: Rejected
) -> None:
    (tmp_path / "empty").mkdir()
    fragments = (
        "not a Megatron-Bridge checkpoint",
        "run_config.yaml is missing",
        "that `import` wrote",
    )
    rejected(arguments_of("export", tmp_path / "empty"), "empty", *fragments)


def test_export_of_a_hugging_face_folder_is_rejected(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, rejected: Rejected
) -> None:
    rejected(
        ["export", tiny("exaone4"), tmp_path / "output"],
        *("is a Hugging Face folder", "`exaone-bridge import`"),
    )


def test_import_of_a_megatron_checkpoint_is_rejected(
    megatron_folder: Path, tmp_path: Path, rejected: Rejected
) -> None:
    rejected(["import", megatron_folder, tmp_path / "output"], "is a Megatron checkpoint")


def iteration(folder: Path) -> Path:
    return folder / "iter_0000000"


def each_shard(folder: Path, change: Callable[[Path], object]) -> None:
    for path in iteration(folder).glob("*.distcp"):
        change(path)


MEGATRON: dict[str, Damage] = {
    "run_config.yaml not YAML": lambda folder: (iteration(folder) / "run_config.yaml").write_text(
        "{{{"
    ),
    "run_config.yaml without a model": lambda folder: (
        iteration(folder) / "run_config.yaml"
    ).write_text("a: 1\n"),
    "a shard missing": lambda folder: (iteration(folder) / "__2_0.distcp").unlink(),
    "truncated shards": lambda folder: each_shard(folder, lambda path: os.truncate(path, 100)),
    ".metadata missing": lambda folder: (iteration(folder) / ".metadata").unlink(),
    "the source's index has no weight_map": lambda folder: (folder / "hf" / INDEX).write_text("{}"),
    "the source's index is wrong": lambda folder: set_source_index(folder, lambda file: 5),
    "the source's index leads out of the folder": lambda folder: set_source_index(
        folder, lambda file: f"../{file}"
    ),
}


def set_source_index(folder: Path, change: Callable[[str], object]) -> None:
    """Change the file names in the copy of the source's index, which `export` uses."""
    path = folder / "hf" / INDEX
    files = {
        name: change(file) for name, file in json.loads(path.read_text())["weight_map"].items()
    }
    path.write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("name", MEGATRON)
def test_export_of_a_damaged_checkpoint_is_rejected(
    name: str, megatron_folder: Path, tmp_path: Path, rejected: Rejected
) -> None:
    folder = tmp_path / "megatron"
    shutil.copytree(megatron_folder, folder)
    MEGATRON[name](folder)
    rejected(arguments_of("export", folder), "megatron")


def stale_index(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add shards of other weights and their index to the single file that Transformers reads."""
    save_file(tensors, folder / "old-1.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "old-1.safetensors")})
    )


def hostile_index(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add an index of weights outside the folder to the file that Transformers reads."""
    save_file(tensors, folder.parent / "evil.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "../evil.safetensors")})
    )


def stray_file(name: str) -> Callable[[Path, dict[str, torch.Tensor]], None]:
    return lambda folder, tensors: save_file(tensors, folder / name)


OTHER_WEIGHTS = {
    "a stale index": stale_index,
    "a hostile index": hostile_index,
    "a stray file, first by name": stray_file("consolidated.safetensors"),
    "a stray file, last by name": stray_file("original.safetensors"),
}


@pytest.mark.parametrize("name", OTHER_WEIGHTS)
def test_import_reads_the_file_that_transformers_reads(
    name: str,
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    cli: Cli,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That is `model.safetensors`, whatever weights are beside it; or the folder is rejected."""
    # Megatron-Bridge takes files in the order of glob: sort them, as file systems differ.
    unsorted = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *args, **kwargs: sorted(unsorted(*args, **kwargs)))
    folder, work = tmp_path / "model", tmp_path / "work"
    shutil.copytree(tiny("exaone4"), folder)
    work.mkdir()
    checked = load_file(folder / WEIGHTS)
    OTHER_WEIGHTS[name](folder, {tensor: value + 1 for tensor, value in checked.items()})
    before = snapshot(tmp_path)
    run = cli("import", folder, tmp_path / "megatron")
    if run.code == 2:
        assert snapshot(tmp_path) == before
        return
    assert run.code == 0
    assert cli("export", tmp_path / "megatron", work / "output").code == 0
    assert [path.name for path in work.iterdir()] == ["output"]
    after = {
        path: kind
        for path, kind in snapshot(tmp_path).items()
        if path.partition("/")[0] not in ("megatron", "work")
    }
    assert after == {path: kind for path, kind in before.items() if path != "work"}
    assert [path.name for path in (work / "output").glob("*safetensors*")] == [WEIGHTS]
    exported = load_file(work / "output" / WEIGHTS)
    assert exported.keys() == checked.keys()
    assert all(torch.equal(exported[tensor], value) for tensor, value in checked.items())
