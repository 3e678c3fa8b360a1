"""Passthrough tensors (the MTP tensors of the 21B) are exported unchanged, or the export stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_headers, read_json
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.errors import CheckpointError, UnmappedTensors
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import (
    compare_files,
    compare_tensors,
)
from tests.helpers.parity import assert_same_folder


def _mtp_names(folder: Path) -> set[str]:
    return {name for name in read_headers(folder) if name.startswith("model.mtp_")}


@pytest.fixture(scope="module")
def imported(megatron_bridge: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "ernie45"
    import_checkpoint(tiny("ernie45-lists", dtype="bfloat16"), folder, Layout(tp=2, ep=2, etp=1))
    return folder


def test_mtp_tensors_are_passthrough(tiny: Any) -> None:
    source = HFCheckpoint.open(tiny("ernie45"))
    assert set(source.passthrough) == _mtp_names(source.folder)
    assert len(source.passthrough) == 12
    # vLLM 0.33, `ernie_mtp.py`: the projection takes the norms of an embedding and a hidden state
    hidden = source.model.dims["H"]
    projection = read_headers(source.folder)["model.mtp_linear_proj.0.weight"]
    assert projection.shape == (hidden, 2 * hidden)


@pytest.mark.parametrize("workers", [1, 3])
def test_export_has_all_tensors_of_the_source(
    tiny: Any, imported: Path, tmp_path: Path, workers: int
) -> None:
    """Among them are the MTP tensors, and the fp32 router tensors of a bf16 model."""
    source, exported = tiny("ernie45-lists", dtype="bfloat16"), tmp_path / "exported"
    export_checkpoint(imported, exported, workers=workers)
    assert len(_mtp_names(exported)) == 12
    for check in (compare_tensors(source, exported), compare_files(source, exported)):
        assert check.passed, check.details
    assert read_json(exported / "config.json") == read_json(source / "config.json")


@pytest.mark.parametrize("name", ["ernie45-300b", "ernie45-dense"])
def test_import_and_export_of_models_without_passthrough_tensors(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    import_checkpoint(tiny(name), tmp_path / "megatron", Layout(pp=2))
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert_same_folder(tiny(name), tmp_path / "exported")


def test_export_without_passthrough_tensors_stops_unless_they_are_dropped(
    tiny: Any, imported: Path, tmp_path: Path
) -> None:
    path = imported / "hf" / "carried.safetensors"
    hidden = path.rename(imported / "hidden")
    try:
        with pytest.raises(CheckpointError, match="file with the passthrough tensors"):
            export_checkpoint(imported, tmp_path / "stopped")
        assert not (tmp_path / "stopped").exists()
        export_checkpoint(imported, tmp_path / "dropped", drop_passthrough=True)
    finally:
        hidden.rename(path)
    source = tiny("ernie45-lists", dtype="bfloat16")
    assert set(read_headers(tmp_path / "dropped")) == set(read_headers(source)) - _mtp_names(source)
    assert read_json(tmp_path / "dropped/config.json")["num_nextn_predict_layers"] == 0
    HFCheckpoint.open(tmp_path / "dropped")


def _save_through_autobridge(source: Path, target: Path) -> list[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("exaone_bridge")
    logging.disable(logging.NOTSET)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_pretrained(build(bridge, Layout()), target, show_progress=False)
    return messages


def test_autobridge_exports_passthrough_tensors_and_logs_it_once(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    source = tiny("ernie45")
    messages = ForkLauncher().first(_save_through_autobridge, source, tmp_path / "exported")
    assert compare_tensors(source, tmp_path / "exported").passed
    logged = [line for line in messages if "passthrough tensors copied from the source: 12" in line]
    assert len(logged) == 1


def _export_without_source(source: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source)
    model = build(bridge, Layout())
    without_source = AutoBridge.from_hf_config(bridge.hf_pretrained.config)
    for _ in without_source.export_hf_weights(model, cpu=True, show_progress=False):
        pass


def test_autobridge_without_its_source_cannot_export_passthrough_tensors(
    megatron_bridge: Any, tiny: Any
) -> None:
    with pytest.raises(UnmappedTensors, match="12 passthrough tensors are missing"):
        ForkLauncher().first(_export_without_source, tiny("ernie45"))
    ForkLauncher().first(_export_without_source, tiny("ernie45", num_nextn_predict_layers=0))
