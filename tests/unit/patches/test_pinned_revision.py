"""A pinned revision of the Hub gets its own weights; the cache is made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.errors import BridgeError
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.hf_snapshot import snapshot_folder
from tests.helpers.cli import read_tensors, same_bits
from tests.helpers.hub import MAIN, MODEL, PINNED, hub

__all__ = ["hub"]


def _load_and_save(target: Path, kwargs: dict[str, str]) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(MODEL, **kwargs)
    model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_hf_pretrained(model, target, show_progress=False)


@pytest.mark.parametrize(
    ("kwargs", "has_main", "commit"),
    [({"revision": PINNED}, True, PINNED), ({"revision": PINNED}, False, PINNED), ({}, True, MAIN)],
    ids=["pinned", "only the pinned one", "main"],
)
def test_weights_and_config_are_of_one_revision(
    kwargs: dict[str, str],
    has_main: bool,
    commit: str,
    megatron_bridge: Any,
    hub: Path,
    tmp_path: Path,
) -> None:
    if not has_main:
        shutil.rmtree(hub / "refs")
        shutil.rmtree(hub / "snapshots" / MAIN)
    ForkLauncher().all(_load_and_save, tmp_path / "saved", kwargs)
    snapshot = hub / "snapshots" / commit
    assert same_bits(read_tensors(tmp_path / "saved"), read_tensors(snapshot))
    configs = [
        json.loads((each / "config.json").read_text()) for each in (tmp_path / "saved", snapshot)
    ]
    assert configs[0]["x_revision"] == configs[1]["x_revision"]


def test_a_revision_that_is_not_there_is_rejected_by_name(hub: Path, tmp_path: Path) -> None:
    assert snapshot_folder(tmp_path, "any") == tmp_path
    assert snapshot_folder(MODEL) == hub / "snapshots" / MAIN
    with pytest.raises(BridgeError, match=f"owner/model: .*revision {'c' * 40}"):
        snapshot_folder(MODEL, "c" * 40)
