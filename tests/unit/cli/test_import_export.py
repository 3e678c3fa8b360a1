"""`exaone-bridge import` and `export`: round trips, options, and what they print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.alone import run_alone
from tests.helpers.cli import (
    INDEX,
    Cli,
    Snapshot,
    assert_equal_folders,
    file_of_each_tensor,
    names_in,
    read_config,
    read_tensors,
    same_bits,
)

TEXT_FILES = ["chat_template.jinja", "generation_config.json"]
TEXT_FILES += ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("options", [[], ["--workers", 3]], ids=str)
def test_export_of_a_sharded_checkpoint_equals_its_source(
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
    assert names_in(tmp_path) == ["exported", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "import_options", "export_options"),
    [
        ("exaone4-1.2b", ["--pp", 3], ["--workers", 2]),
        ("exaone4", ["--pp", 2, "--vpp", 4, "--workers", 2], []),
        ("ernie45-300b", ["--ep", 2], ["--max-shard-size", "1GB"]),
    ],
)
def test_import_and_export_of_a_single_file_equal_the_source(
    name: str,
    import_options: list[object],
    export_options: list[object],
    megatron_bridge: Any,
    tiny: Any,
    cli: Cli,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    source = tiny(name, seed=1)
    before = snapshot(source)
    imported = cli("import", source, tmp_path / "megatron", *import_options)
    assert (imported.code, imported.err) == (0, "")
    assert "megatron: " in imported.out and f"{len(read_tensors(source))} tensors" in imported.out
    assert snapshot(source) == before
    assert cli("export", tmp_path / "megatron", tmp_path / "exported", *export_options).code == 0
    assert_equal_folders(tmp_path / "exported", source)
    assert names_in(tmp_path) == ["exported", "megatron", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_empty_folders_are_written(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    """As the mount points of a container are."""
    for name in ("megatron", "exported"):
        (tmp_path / name).mkdir()
    assert cli("import", tiny("exaone4"), "megatron").code == 0
    assert cli("export", "megatron", "exported", "--dry-run").code == 0
    assert cli("export", "megatron", "exported").code == 0
    assert_equal_folders(tmp_path / "exported", tiny("exaone4"))
    assert not [name for name in names_in(tmp_path / "megatron") if ".partial" in name]


def test_import_and_export_without_a_tokenizer(
    megatron_bridge: Any, cli: Cli, tmp_path: Path
) -> None:
    config = {**EXAONE4.tiny["exaone4"], "dtype": "bfloat16"}
    write_random(tmp_path / "model", config, tokenizer=False)
    assert names_in(tmp_path / "model") == ["config.json", "model.safetensors"]
    assert cli("import", "model", tmp_path / "megatron", "--tp", 2).code == 0
    assert cli("export", tmp_path / "megatron", "exported").code == 0
    assert_equal_folders(tmp_path / "exported", tmp_path / "model")
    assert cli("verify", "model", "--quick").code == 0


def test_import_to_a_path_used_before_exports_the_second_model(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    for name in EXAONE4.tiny:
        shutil.rmtree(tmp_path / "megatron", ignore_errors=True)
        assert cli("import", tiny(name), tmp_path / "megatron").code == 0
        assert cli("export", tmp_path / "megatron", tmp_path / name).code == 0
        assert_equal_folders(tmp_path / name, tiny(name))


@pytest.fixture
def rolled_back(megatron_folder: Path, tmp_path: Path) -> Path:
    """Return a checkpoint whose tracker names iteration 0, with a newer one of other weights."""
    folder = tmp_path / "megatron"
    shutil.copytree(megatron_folder, folder)
    write_random(tmp_path / "other", EXAONE4.tiny["exaone4"], seed=9)
    import_checkpoint(tmp_path / "other", tmp_path / "imported", Layout())
    shutil.move(tmp_path / "imported" / "iter_0000000", folder / "iter_0000010")
    return folder


def test_the_tracked_iteration_is_exported_and_named(
    rolled_back: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("export", rolled_back, "tracked")
    assert run.code == 0 and "iter_0000010 is newer and is not read" in run.out
    assert_equal_folders(tmp_path / "tracked", sharded)
    assert cli("export", rolled_back, "newer", "--iteration", 10).code == 0
    assert same_bits(read_tensors(tmp_path / "newer"), read_tensors(tmp_path / "other"))
    assert cli("export", rolled_back / "iter_0000000", "named").code == 0
    assert_equal_folders(tmp_path / "named", sharded)
    (rolled_back / "iter_0000010" / ".metadata").unlink()
    assert cli("export", rolled_back, "again").code == 0
    run = cli("export", rolled_back, "missing", "--iteration", 3)
    assert run.code == 2 and "'3' is requested" in run.err and "(there are: 0, 10)" in run.err


def test_autobridge_loads_the_tracked_iteration(
    rolled_back: Path, sharded: Path, tmp_path: Path
) -> None:
    ForkLauncher().all(_load_and_save, sharded, rolled_back, tmp_path / "saved")
    assert same_bits(read_tensors(tmp_path / "saved"), read_tensors(sharded))


def _load_and_save(source: Path, megatron: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    AutoBridge.from_auto_config(str(megatron), str(source))
    bridge = AutoBridge.from_hf_pretrained(source)
    model = bridge.load_megatron_model(megatron)
    bridge.save_hf_pretrained(model, target, show_progress=False)


def test_export_without_source_and_hf_folder(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    """Weights and config are exported; the tokenizer files, kept in `hf`, are not."""
    shutil.copytree(megatron_folder, tmp_path / "megatron")
    shutil.rmtree(tmp_path / "megatron" / "hf")
    sharded.rename(sharded.with_name("away"))
    try:
        assert cli("export", tmp_path / "megatron", "exported").code == 0
    finally:
        sharded.with_name("away").rename(sharded)
    assert same_bits(read_tensors(tmp_path / "exported"), read_tensors(sharded))
    assert read_config(tmp_path / "exported") == read_config(sharded)
    assert not any((tmp_path / "exported" / file).exists() for file in [*TEXT_FILES, INDEX])


def _import_ckpt(source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    tempfile.tempdir = None  # as in save_through_autobridge
    AutoBridge.import_ckpt(source, target)


def test_files_are_exported_from_where_they_are_and_that_is_said(
    megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    """AutoBridge.import_ckpt writes the tokenizer into the iteration."""
    source, megatron = tiny("exaone4"), tmp_path / "megatron"
    run_alone(_import_ckpt, source, megatron)
    folder = megatron / "iter_0000000" / "tokenizer"
    run = cli("export", megatron, "exported")
    assert run.code == 0 and f"{folder}: {len(list(folder.iterdir()))} files are copied" in run.out
    for path in folder.iterdir():
        assert (tmp_path / "exported" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "exported" / "tokenizer.json").is_file()
    shutil.rmtree(folder)
    run = cli("export", megatron, "bare")
    assert run.code == 0 and "warning: the checkpoint has no tokenizer" in run.out
    run = cli("export", megatron, "given", "--hf-source", source)
    assert run.code == 0 and f"{source}: 4 files are copied" in run.out
    for name in TEXT_FILES:
        assert (tmp_path / "given" / name).read_bytes() == (source / name).read_bytes()


def test_export_has_the_logits_of_its_source_in_transformers(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert cli("export", megatron_folder, "exported").code == 0
    tokens = torch.arange(40)[None]
    exported, source = (
        AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in ("exported", sharded)
    )
    assert torch.equal(exported, source)
    template = AutoTokenizer.from_pretrained("exported").chat_template
    assert template == (sharded / "chat_template.jinja").read_text()


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_export_of_a_checkpoint_that_megatron_bridge_saved(
    name: str, megatron_bridge: Any, tiny: Any, cli: Cli, tmp_path: Path
) -> None:
    """It has other shards and extra states; passthrough tensors come from the folder `hf`."""
    source = tiny(name, dtype="bfloat16")
    layout = Layout(tp=2, pp=2) if name == "exaone4" else Layout(tp=2, ep=2, etp=1)
    assert cli("import", source, tmp_path / "imported").code == 0
    ForkLauncher(layout.ranks).all(save_through_autobridge, source, tmp_path / "megatron", layout)
    shutil.copytree(tmp_path / "imported" / "hf", tmp_path / "megatron" / "hf")
    assert cli("export", tmp_path / "megatron", tmp_path / "exported").code == 0
    assert same_bits(read_tensors(tmp_path / "exported"), read_tensors(source))


def save_through_autobridge(source: Path, target: Path, layout: Any) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    tempfile.tempdir = None  # Megatron-Bridge opens a socket there: at most 107 characters
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(build(bridge, layout), target)


def test_max_shard_size_splits_the_export_and_rejects_other_texts(
    megatron_folder: Path, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    assert cli("export", megatron_folder, "exported", "--max-shard-size", "200KB").code == 0
    files = file_of_each_tensor(tmp_path / "exported")
    sizes = {file: (tmp_path / "exported" / file).stat().st_size for file in files.values()}
    assert len(sizes) == 8 and all(size < 210_000 for size in sizes.values())
    assert same_bits(read_tensors(tmp_path / "exported"), read_tensors(sharded))
    for text in ("0", "-1", "5 apples", "GB", "", "1e400GB", "nan"):
        run = cli("export", megatron_folder, "other", "--max-shard-size", text)
        assert run.code == 2 and "such as 5GB" in run.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_dry_run_writes_nothing(
    command: str, megatron_folder: Path, sharded: Path, cli: Cli, snapshot: Snapshot, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    source = sharded if command == "import" else megatron_folder
    run = cli(command, source, tmp_path / "output", "--dry-run")
    assert run.code == 0
    assert "91 tensors, 1.38 MB would be written; nothing was" in " ".join(run.out.split())
    assert snapshot(tmp_path) == before


def test_import_prints_its_stages_and_a_summary(
    megatron_bridge: Any, sharded: Path, cli: Cli, tmp_path: Path
) -> None:
    run = cli("import", sharded, tmp_path / "megatron")
    (line,) = [line for line in run.out.splitlines() if line.startswith(str(tmp_path / "megatron"))]
    summary = r"91 tensors, 1\.38 MB, \d+\.\d s, \d+\.\d\d [KM]B/s, "
    summary += r"peak memory \d+\.\d\d GiB per process \(\d+ MiB of it"
    assert re.search(summary, line), line
    assert "import: writing the Megatron checkpoint" in run.out and "1.38 MB of 1.38 MB" in run.out


_WITHOUT_MEGATRON = """
import sys
sys.modules["megatron"] = None  # as on a machine without it: every import of it fails
from exaone_bridge.cli import main
sys.argv = ["exaone-bridge", "export", *sys.argv[1:]]
main()
"""


def test_export_needs_no_megatron(megatron_folder: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_MEGATRON, str(megatron_folder), str(tmp_path / "output")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "output" / "config.json").is_file()
