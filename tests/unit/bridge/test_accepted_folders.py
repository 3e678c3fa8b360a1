"""Command line and AutoBridge read a folder alike that differs from its config without a loss."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification import verify
from tests.helpers.cli import read_config, read_tensors, same_bits
from tests.helpers.damage import WEIGHTS, set_config
from tests.helpers.unloaded import unloaded_model

Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INV_FREQ = "model.rotary_emb.inv_freq"


def _bf16(tensors: Tensors) -> Tensors:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def _with_duplicates(tensors: Tensors) -> Tensors:
    frequencies = 1.0 / 1e6 ** (torch.arange(0, 24, 2) / 24)
    return {**tensors, HEAD: tensors[EMBEDDING].clone(), INV_FREQ: frequencies}


def _fp32_norms(tensors: Tensors) -> Tensors:
    return {
        name: tensor.float() if "norm" in name else tensor
        for name, tensor in _bf16(tensors).items()
    }


# name -> tiny model, its tensors in the folder, those of an export, fields of config.json
CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], Callable[[Tensors], Tensors], Any]] = {
    "duplicates": ("exaone4-1.2b", _with_duplicates, dict, {}),
    "no dtype": ("exaone4", _bf16, _bf16, {"dtype": ...}),
    "fp32 norms": ("exaone4", _fp32_norms, _bf16, {"dtype": "bfloat16"}),
    "all in bf16": (
        "ernie45",
        _bf16,
        lambda tensors: {
            name: tensor.float() if ".gate.weight" in name or "moe_statics" in name else tensor
            for name, tensor in _bf16(tensors).items()
        },
        {"dtype": "bfloat16"},
    ),
}


@pytest.fixture(params=CASES)
def accepted(request: Any, tiny: Any, tmp_path: Path) -> tuple[Path, Tensors]:
    """Return a folder, and the tensors that an export of it has."""
    name, change, exported, fields = CASES[request.param]
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    source = tiny(name, **(rope if name == "exaone4-1.2b" else {}))
    shutil.copytree(source, folder := tmp_path / "model")
    set_config(**fields)(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder, exported(tensors)


def _load_and_save(folder: Path, work: Path) -> list[str]:
    """Save with the plan and with Megatron-Bridge's own code, and return what was logged."""
    from megatron.bridge import AutoBridge

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("exaone_bridge").addHandler(handler)
    logging.disable(logging.NOTSET)
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, Layout())
    bridge.load_hf_weights(model)
    bridge.save_hf_pretrained(model, work / "planned", show_progress=False)
    (work / "generic").mkdir()
    AutoBridge.save_hf_weights.__wrapped__(bridge, model, work / "generic", show_progress=False)
    return lines


def test_auto_bridge_loads_and_saves_it(
    megatron_bridge: Any, accepted: tuple[Path, Tensors], tmp_path: Path
) -> None:
    folder, expected = accepted
    (lines,) = ForkLauncher(1).all(_load_and_save, folder, tmp_path)
    assert any("left out" in line or "cast from" in line or "dtype" in line for line in lines)
    assert same_bits(read_tensors(tmp_path / "planned"), expected)
    generic = read_tensors(tmp_path / "generic")
    assert generic.keys() == load_file(folder / WEIGHTS).keys()  # no file of the source is lost
    assert same_bits({name: generic[name] for name in expected}, expected)
    dtype = next(iter(expected.values())).dtype
    assert read_config(tmp_path / "planned")["dtype"] == str(dtype).removeprefix("torch.")


def test_verify_passes_and_says_what_differs(
    megatron_bridge: Any, accepted: tuple[Path, Tensors]
) -> None:
    report = verify(accepted[0], quick=True)
    assert report.passed, report.failures()
    assert report.notes and report.to_dict()["notes"] == list(report.notes)


def test_import_and_export_equal_what_auto_bridge_saves(
    megatron_bridge: Any, accepted: tuple[Path, Tensors], tmp_path: Path
) -> None:
    from exaone_bridge.convert.to_hf import export_checkpoint
    from exaone_bridge.convert.to_megatron import import_checkpoint

    folder, expected = accepted
    summary = import_checkpoint(folder, tmp_path / "megatron", Layout())
    assert summary.notes and summary.notes[0].startswith(f"{folder}: ")
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert same_bits(read_tensors(tmp_path / "exported"), expected)
