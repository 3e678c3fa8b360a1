"""The next-token-prediction tensors that the 21B ships survive every way through Megatron, or the export stops."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_headers, read_json
from exaone_bridge.convert.convert import export_checkpoint, import_checkpoint
from exaone_bridge.errors import CheckpointError, UnmappedTensors
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_files,
    compare_tensors,
)


def _mtp(folder: Path) -> set[str]:
    return {name for name in read_headers(folder) if name.startswith("model.mtp_")}


@pytest.fixture(scope="module")
def imported(megatron_bridge: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "ernie45"
    import_checkpoint(tiny("ernie45", dtype="bfloat16"), folder, Layout(tp=2, ep=2, etp=1))
    return folder


def test_they_are_there(tiny: Any) -> None:
    source = HFCheckpoint.open(tiny("ernie45"))
    assert set(source.passthrough) == _mtp(source.folder)
    assert len(source.passthrough) == 12


@pytest.mark.parametrize("workers", [1, 3])
def test_export_from_the_checkpoint_alone(
    tiny: Any, imported: Path, tmp_path: Path, workers: int
) -> None:
    """Bitwise, fp32 router tensors in a bf16 model and next-token prediction included."""
    source, exported = tiny("ernie45", dtype="bfloat16"), tmp_path / "exported"
    export_checkpoint(imported, exported, workers=workers)
    assert len(_mtp(exported)) == 12
    for check in (compare_tensors(source, exported), compare_files(source, exported)):
        assert check.passed, check.details
    plain = read_json(source / "config.json")
    for field in (
        "moe_num_experts",
        "moe_intermediate_size",
        "moe_layer_start_index",
        "moe_layer_end_index",
    ):
        plain[field] = plain[field][
            0
        ]  # lists, which Transformers cannot read, become the numbers it can
    assert compare_configs(plain, read_json(exported / "config.json")).passed


@pytest.mark.parametrize("name", ["ernie45-300b", "ernie45-dense"])
def test_import_and_export_of_the_others(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    import_checkpoint(tiny(name), tmp_path / "megatron", Layout(pp=2))
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert compare_tensors(tiny(name), tmp_path / "exported").passed
    assert compare_configs(
        read_json(tiny(name) / "config.json"), read_json(tmp_path / "exported/config.json")
    ).passed


def test_out_of_reach_stops_the_export_unless_told(
    tiny: Any, imported: Path, tmp_path: Path
) -> None:
    path = imported / "hf" / "carried.safetensors"
    hidden = path.rename(imported / "hidden")
    try:
        with pytest.raises(CheckpointError, match="travel beside the model"):
            export_checkpoint(imported, tmp_path / "stopped")
        assert not (tmp_path / "stopped").exists()
        export_checkpoint(imported, tmp_path / "dropped", drop_passthrough=True)
    finally:
        hidden.rename(path)
    source = tiny("ernie45", dtype="bfloat16")
    assert set(read_headers(tmp_path / "dropped")) == set(read_headers(source)) - _mtp(source)
    assert read_json(tmp_path / "dropped/config.json")["num_nextn_predict_layers"] == 0
    HFCheckpoint.open(tmp_path / "dropped")


def _save_through_autobridge(source: Path, target: Path) -> list[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("exaone_bridge")
    logging.disable(logging.NOTSET)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_pretrained(build(bridge, Layout()), target, show_progress=False)
    return said


def test_autobridge_carries_them_and_says_so_once(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    source = tiny("ernie45")
    (said,) = ForkLauncher(1).all(_save_through_autobridge, source, tmp_path / "exported")
    assert compare_tensors(source, tmp_path / "exported").passed
    assert (
        len([line for line in said if "carried from the source unchanged: 12 tensors" in line]) == 1
    )


def _export_without_source(source: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source)
    model = build(bridge, Layout())
    bare = AutoBridge.from_hf_config(bridge.hf_pretrained.config)
    for _ in bare.export_hf_weights(model, cpu=True, show_progress=False):
        pass


def test_autobridge_without_its_source_stops(megatron_bridge: Any, tiny: Any) -> None:
    with pytest.raises(UnmappedTensors, match="cannot be reached"):
        ForkLauncher(1).all(_export_without_source, tiny("ernie45"))
    ForkLauncher(1).all(_export_without_source, tiny("ernie45", num_nextn_predict_layers=0))
