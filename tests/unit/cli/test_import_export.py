"""`exaone-bridge import` and `export`: round trips, options, and what they print."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.models.exaone4 import EXAONE4
from tests.helpers.cli import (
    INDEX,
    Cli,
    Snapshot,
    assert_equal_folders,
    config_of,
    files_of,
    same_bits,
    tensors_of,
)

TEXT_FILES = [
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("options", [[], ["--workers", 3]], ids=str)
def test_a_sharded_checkpoint_comes_back(
    options: list[object],
    sharded: Path,
    megatron_folder: Path,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    before = snapshot(megatron_folder)
    run = cli("export", megatron_folder, tmp_path / "exported", *options)
    assert (run.code, run.err) == (0, "") and "91 tensors" in " ".join(run.out.split())
    assert_equal_folders(tmp_path / "exported", sharded)
    assert (tmp_path / "exported" / "chat_template.jinja").is_file()
    index = json.loads((tmp_path / "exported" / INDEX).read_text())
    assert index == json.loads((sharded / INDEX).read_text())
    assert snapshot(megatron_folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "to_megatron", "back"),
    [
        ("exaone4-1.2b", ["--pp", 3], ["--workers", 2]),
        ("exaone4", ["--pp", 2, "--vpp", 4, "--workers", 2], []),
        ("ernie45-300b", ["--ep", 2], ["--max-shard-size", "1GB"]),
    ],
)
def test_a_single_file_comes_back(
    name: str,
    to_megatron: list[object],
    back: list[object],
    megatron_bridge: Any,
    tiny: Any,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    source = tiny(name, seed=1)
    before = snapshot(source)
    imported = cli("import", source, tmp_path / "megatron", *to_megatron)
    assert (imported.code, imported.err) == (0, "")
    assert "megatron: " in imported.out and f"{len(tensors_of(source))} tensors" in imported.out
    assert snapshot(source) == before
    assert cli("export", tmp_path / "megatron", tmp_path / "exported", *back).code == 0
    assert_equal_folders(tmp_path / "exported", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "megatron", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_checkpoint_without_a_tokenizer_comes_back(
    megatron_bridge: Any, cli: Cli, tmp_path: Path
) -> None:
    config = {**EXAONE4.tiny["exaone4"], "dtype": "bfloat16"}
    write_random(tmp_path / "model", config, tokenizer=False)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert cli("import", "model", tmp_path / "megatron", "--tp", 2).code == 0
    assert cli("export", tmp_path / "megatron", "exported").code == 0
    assert_equal_folders(tmp_path / "exported", tmp_path / "model")
    assert cli("verify", "model", "--quick").code == 0


def test_a_path_that_is_written_twice_has_its_second_model(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    for name in EXAONE4.tiny:
        shutil.rmtree(tmp_path / "megatron", ignore_errors=True)
        assert cli("import", tiny(name), tmp_path / "megatron").code == 0
        assert cli("export", tmp_path / "megatron", tmp_path / name).code == 0
        assert_equal_folders(tmp_path / name, tiny(name))


def test_export_needs_the_checkpoint_alone(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    """Neither the source nor the folder `hf` is there: weights and configuration still are."""
    shutil.copytree(megatron_folder, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    sharded.rename(sharded.with_name("away"))
    try:
        assert cli("export", tmp_path / "megatron", "exported").code == 0
    finally:
        sharded.with_name("away").rename(sharded)
    assert same_bits(tensors_of(tmp_path / "exported"), tensors_of(sharded))
    assert config_of(tmp_path / "exported") == config_of(sharded)
    assert not any((tmp_path / "exported" / file).exists() for file in [*TEXT_FILES, INDEX])


def test_transformers_loads_an_export(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli("export", megatron_folder, "exported").code == 0
    tokens = torch.arange(40)[None]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in ("exported", sharded)
    )
    assert torch.equal(ours, theirs)
    assert (
        AutoTokenizer.from_pretrained("exported").chat_template
        == (sharded / "chat_template.jinja").read_text()
    )


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_what_the_host_wrote_is_exported(
    name: str, megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    """At other layouts than ours, with extra states; tensors beside the model come from the folder `hf`."""
    from exaone_bridge.runtime.fork import ForkLauncher
    from exaone_bridge.schema.parallel_layout import Layout

    source = tiny(name, dtype="bfloat16")
    layout = Layout(tp=2, pp=2) if name == "exaone4" else Layout(tp=2, ep=2, etp=1)
    assert cli("import", source, tmp_path / "ours").code == 0
    ForkLauncher(layout.ranks).all(save_by_host, source, tmp_path / "megatron", layout)
    shutil.copytree(tmp_path / "ours" / "hf", tmp_path / "megatron" / "hf")
    assert cli("export", tmp_path / "megatron", tmp_path / "exported").code == 0
    assert same_bits(tensors_of(tmp_path / "exported"), tensors_of(source))


def save_by_host(source: Path, target: Path, layout: Any) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    tempfile.tempdir = None  # the host makes a socket there, whose path may have 107 characters
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(build(bridge, layout), target)


def test_max_shard_size(megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("export", megatron_folder, "exported", "--max-shard-size", "200KB").code == 0
    files = files_of(tmp_path / "exported")
    sizes = {file: (tmp_path / "exported" / file).stat().st_size for file in files.values()}
    assert len(sizes) == 8 and all(size < 210_000 for size in sizes.values())
    assert same_bits(tensors_of(tmp_path / "exported"), tensors_of(sharded))
    for text in ("0", "-1", "5 apples", "GB", "", "1e400GB", "nan"):
        run = cli("export", megatron_folder, "other", "--max-shard-size", text)
        assert run.code == 2 and "such as 5GB" in run.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_dry_run_writes_nothing(
    command: str, megatron_folder: Path, sharded: Path, cli: Cli, snapshot: Snapshot, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    run = cli(
        command,
        sharded if command == "import" else megatron_folder,
        tmp_path / "output",
        "--dry-run",
    )
    assert run.code == 0 and "91 tensors, 0.00 GB would be written; nothing was" in " ".join(
        run.out.split()
    )
    assert snapshot(tmp_path) == before


def test_a_conversion_ends_with_its_figures(
    megatron_bridge: Any, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("import", sharded, tmp_path / "megatron")
    (line,) = [line for line in run.out.splitlines() if line.startswith(str(tmp_path / "megatron"))]
    figures = r"91 tensors, 0\.00 GB, \d+\.\d s, \d\.\d\d GB/s, peak memory \d+\.\d\d GiB a process \(\d+ MiB of it"
    assert re.search(figures, line), line
    assert "import: writing the Megatron checkpoint" in run.out and "0.00 of 0.00 GB" in run.out
