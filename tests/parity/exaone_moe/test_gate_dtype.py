"""The router's weight is written in the dtype that it was read in: the model's, or fp32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from exaone_bridge.verification.self_test.fault import changed_provider
from tests.helpers.parity import assert_passes, assert_same_folder

Gates = Callable[..., Path]
GATE = "mlp.gate.weight"


@pytest.fixture
def gates(tiny: Any, tmp_path: Path) -> Gates:
    """Return `gates("float32")`: the folder of a bf16 model with gates of this dtype.

    fp32 gates have values that bf16 has not; `layers` are those whose gates are fp32.
    """

    def make(dtype: str, layers: tuple[int, ...] = (1, 2, 3)) -> Path:
        source: Path = tiny("exaone-moe", dtype="bfloat16", num_nextn_predict_layers=0)
        if dtype == "bfloat16":
            return source
        folder = tmp_path / "source"
        shutil.copytree(source, folder)
        tensors = load_file(source / "model.safetensors")
        for layer in layers:
            name = f"model.layers.{layer}.{GATE}"
            tensors[name] = tensors[name].float() * 1.001
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, ep=2, sp=True)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_load_and_save_keep_the_dtype(
    megatron_bridge: Any, gates: Gates, dtype: str, layout: Layout
) -> None:
    """The logits are those of Transformers, which takes the gates in either dtype."""
    assert_passes(gates(dtype), layout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_and_export_keep_the_dtype(
    megatron_bridge: Any, gates: Gates, tmp_path: Path, dtype: str
) -> None:
    source = gates(dtype)
    import_checkpoint(source, tmp_path / "megatron", Layout(pp=2))
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert_same_folder(source, tmp_path / "exported")


def _load_megatron_and_save(megatron: Path, source: Path, target: Path) -> None:
    """Save through Megatron-Core's checkpoint of a model in memory, whose gates are fp32."""
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build, load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(build(bridge, Layout()), megatron)
    model = load_megatron(bridge, megatron, Layout())
    router = unwrap_model(model[0]).decoder.layers[1].mlp.router
    assert router.weight.dtype is torch.float32
    bridge.save_hf_pretrained(model, target, show_progress=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_megatron_checkpoint_keeps_the_dtype(
    megatron_bridge: Any, gates: Gates, tmp_path: Path, dtype: str
) -> None:
    source = gates(dtype)
    ForkLauncher().first(_load_megatron_and_save, tmp_path / "megatron", source, tmp_path / "saved")
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert compare_tensors(source, tmp_path / "saved").passed
    assert compare_tensors(source, tmp_path / "exported").passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gates_written_in_the_other_dtype_are_reported(
    megatron_bridge: Any, gates: Gates, tmp_path: Path, dtype: str
) -> None:
    source = gates(dtype)
    with changed_provider({"router_fp32_on_disk": dtype == "bfloat16"}):
        ForkLauncher().first(
            _load_megatron_and_save, tmp_path / "megatron", source, tmp_path / "saved"
        )
    check = compare_tensors(source, tmp_path / "saved")
    assert not check.passed and f"model.layers.1.{GATE}" in str(check.details), check.details


def test_gates_of_both_dtypes_become_fp32(gates: Gates) -> None:
    checkpoint = HFCheckpoint.open(gates("float32", layers=(2,)))
    assert {info.dtype for name, info in checkpoint.tensors.items() if GATE in name} == {"F32"}
    (note,) = checkpoint.notes
    assert note.startswith(f"model.layers.1.{GATE} and 1 more: cast from BF16 to F32")
