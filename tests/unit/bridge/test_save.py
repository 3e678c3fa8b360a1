"""Folders that AutoBridge saves into: new ones, existing ones, links, and other file systems."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout


def _save(source: Path, work: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source)
    model = build(bridge, Layout(tp=2))
    for path in (work / "new", work / "a" / "b" / "c", work / "link"):
        bridge.save_hf_pretrained(model, path, show_progress=False)
    bridge.save_hf_weights(model, work / "d" / "weights", show_progress=False)
    os.chdir(work / "here")
    bridge.save_hf_pretrained(model, ".", show_progress=False)
    bridge.save_hf_pretrained(model, Path("relative"), show_progress=False)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_save_into_missing_parents_links_and_the_present_folder(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    shared_memory = Path("/dev/shm")
    place = shared_memory if os.access(shared_memory, os.W_OK) else tmp_path
    (tmp_path / "here").mkdir()
    with tempfile.TemporaryDirectory(dir=place) as elsewhere:
        (tmp_path / "link").symlink_to(elsewhere)
        ForkLauncher(2).all(_save, tiny("exaone4"), tmp_path)
        wanted = _contents(tmp_path / "new")
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= wanted.keys()
        for name in ("a/b/c", "link", "here", "here/relative"):
            assert _contents(tmp_path / name) == wanted, name
        assert (tmp_path / "link").is_symlink()
        assert [path.name for path in (tmp_path / "d" / "weights").iterdir()] == [
            "model.safetensors"
        ]
        assert not list(tmp_path.rglob("*.partial")) and not list(Path(elsewhere).glob(".partial"))


def _save_under_a_file(source: Path, path: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_weights(build(bridge, Layout(tp=2)), path, show_progress=False)


def test_a_file_is_no_parent_folder(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="the folder to create it in does not exist"):
        ForkLauncher(2).all(_save_under_a_file, tiny("exaone4"), tmp_path / "file" / "out")
