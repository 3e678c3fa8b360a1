"""The command line run in this process, and a Megatron checkpoint for every test that only reads one."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exaone_bridge.cli import main

SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Run:
    """What one command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Run]:
    """`cli("inspect", folder)`: `exaone-bridge inspect folder`, run here.

    The working folder and the temporary files are in `tmp_path`, where a test can see what was left behind.
    """
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    disabled = logging.root.manager.disable

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["exaone-bridge", *map(str, arguments)])
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            logging.disable(disabled)
        code = ended.value.code
        out, err = capsys.readouterr()
        return Run(code if isinstance(code, int) else int(code is not None), out, err)

    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, object]]:
    """`snapshot(folder)`: every path below it, hidden ones too, with its bytes or where it links to."""

    def take(folder: Path) -> dict[str, object]:
        return {
            str(path.relative_to(folder)): path.readlink()
            if path.is_symlink()
            else "folder"
            if path.is_dir()
            else path.read_bytes()
            for path in folder.rglob("*")
        }

    return take


@pytest.fixture(scope="session")
def reshard() -> Callable[[Path], None]:
    """`reshard(folder)`: its one file of weights becomes three and an index, neighbours in different files."""

    def cut(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: SHARDS[number % 3] for number, name in enumerate(sorted(tensors))}
        for shard in SHARDS:
            held = {name: tensors[name] for name, file in weight_map.items() if file == shard}
            save_file(held, folder / shard, metadata={"format": "pt"})
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index))

    return cut


@pytest.fixture(scope="session")
def sharded(
    tiny: Callable[..., Path],
    reshard: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The hybrid miniature in three shards."""
    folder = tmp_path_factory.mktemp("sharded") / "exaone4"
    shutil.copytree(tiny("exaone4"), folder)
    reshard(folder)
    return folder


@pytest.fixture(scope="session")
def megatron_folder(
    megatron_bridge: Any, sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `import` makes of `sharded` with three workers. Read it, or copy it and damage the copy."""
    from exaone_bridge.convert.convert import import_checkpoint
    from exaone_bridge.schema.parallel_layout import Layout

    folder = tmp_path_factory.mktemp("megatron") / "exaone4"
    import_checkpoint(sharded, folder, Layout(tp=2, pp=2), workers=3)
    return folder


@pytest.fixture
def layer_2_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the arithmetic alone: the layer with 0-based number 2 forgets its window."""
    from exaone_bridge.modules import attention

    right = attention.is_layer_window_attention

    def forgetful(window: Any, skip: Any, layer_number: int) -> bool:
        return layer_number != 3 and right(window, skip, layer_number)

    monkeypatch.setattr(attention, "is_layer_window_attention", forgetful)
