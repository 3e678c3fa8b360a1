"""Megatron checkpoints through AutoBridge on the CPU: saved at one layout, loaded at another."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.checkpoint.megatron.tensors import MegatronCheckpoint
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_files,
    compare_tensors,
)
from tests.helpers.alone import run_alone


def _import_ckpt(source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(source, target)


def _export_ckpt(source: Path, megatron: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    AutoBridge.from_hf_pretrained(source).export_ckpt(
        megatron, target, show_progress=False, strict=True
    )


def _from_auto_config(megatron: Path, source: Path, found: Path) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_auto_config(str(megatron), str(source))
    found.write_text(bridge.hf_pretrained.to_json_string())


def _save(source: Path, target: Path, layout: Layout) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_megatron_model(build(bridge, layout), target)


def _load(source: Path, megatron: Path, target: Path, layout: Layout) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_pretrained(load_megatron(bridge, megatron, layout), target, show_progress=False)


def _assert_same(source: Path, exported: Path) -> None:
    for check in (
        compare_tensors(source, exported),
        compare_configs(read_json(source / "config.json"), read_json(exported / "config.json")),
    ):
        assert check.passed, f"{check.name}: {check.details}"


@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b", "ernie45-300b", "ernie45-dense"])
def test_import_ckpt_and_export_ckpt(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    """The documented calls; the config also from the Megatron checkpoint alone."""
    source = tiny(name)
    run_alone(_import_ckpt, source, tmp_path / "megatron")
    run_alone(_export_ckpt, source, tmp_path / "megatron", tmp_path / "exported")
    _assert_same(source, tmp_path / "exported")
    files = compare_files(source, tmp_path / "exported")
    assert files.passed, files.details
    run_alone(_from_auto_config, tmp_path / "megatron", source, tmp_path / "config.json")
    assert compare_configs(
        read_json(source / "config.json"), read_json(tmp_path / "config.json")
    ).passed


def test_without_tokenizer(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("exaone4"), source)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    run_alone(_import_ckpt, source, tmp_path / "megatron")
    run_alone(_export_ckpt, source, tmp_path / "megatron", tmp_path / "exported")
    _assert_same(source, tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (Layout(tp=2, pp=2), Layout()),
        (Layout(), Layout(tp=2, pp=2, vpp=2)),
        (Layout(pp=2, vpp=2), Layout(tp=4)),
        (Layout(tp=2, sp=True), Layout(pp=2)),
    ],
    ids=lambda layout: str(layout),
)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_saved_at_one_layout_loaded_at_another(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str, saved: Layout, loaded: Layout
) -> None:
    """A vocabulary of 387: each layout pads the vocabulary differently."""
    source = (
        tiny(name)
        if name == "exaone4"
        else tiny(name, num_hidden_layers=8, layer_types=["full_attention"] * 8)
    )
    ForkLauncher(saved.ranks).all(_save, source, tmp_path / "megatron", saved)
    ForkLauncher(loaded.ranks).all(
        _load, source, tmp_path / "megatron", tmp_path / "exported", loaded
    )
    _assert_same(source, tmp_path / "exported")


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (Layout(tp=2, ep=2), Layout()),
        (Layout(), Layout(tp=2, ep=2, etp=1)),
        (Layout(pp=2, ep=2), Layout(ep=4)),
        (Layout(ep=2, etp=2), Layout(pp=2, vpp=2)),
    ],
    ids=lambda layout: str(layout),
)
def test_experts_saved_at_one_layout_loaded_at_another(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, saved: Layout, loaded: Layout
) -> None:
    source = tiny("ernie45-300b", dtype="bfloat16", use_bias=True)
    ForkLauncher(saved.ranks).all(_save, source, tmp_path / "megatron", saved)
    ForkLauncher(loaded.ranks).all(
        _load, source, tmp_path / "megatron", tmp_path / "exported", loaded
    )
    _assert_same(source, tmp_path / "exported")


def test_run_config_is_plain_and_keeps_the_wishes(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """Fields that the torch backend overrides on this machine keep their requested values."""
    import yaml

    source = tiny("exaone4")
    ForkLauncher(1).all(_save, source, tmp_path / "megatron", Layout())
    (path,) = (tmp_path / "megatron").glob("iter_*/run_config.yaml")
    model = yaml.safe_load(path.read_text())["model"]
    assert model["_target_"] == "exaone_bridge.models.exaone4.provider.Exaone4ModelProvider"
    spec = {
        "_target_": "exaone_bridge.models.exaone4.layer_spec.exaone4_block_spec",
        "_call_": False,
    }
    assert model["transformer_layer_spec"] == spec
    assert model["bias_activation_fusion"] is True
    assert model["apply_rope_fusion"] is True
    assert model["backend"] == "auto"
    assert model["window_size"] == [7, 0]
    assert model["no_rope_freq"] == [0, 0, 0, 1] * 2
    assert json.loads(json.dumps(model["hf_config"])) == read_json(source / "config.json")


@pytest.mark.slow
def test_streaming_has_one_parameter_in_memory_at_a_time(
    megatron_bridge: Any, tmp_path: Path
) -> None:
    """The checkpoint has four times the bound; benchmarks/convert.py shows it at 16 GB."""
    layers = 24
    config = {
        **EXAONE4.tiny["exaone4-1.2b"],
        "dtype": "bfloat16",
        "hidden_size": 512,
        "intermediate_size": 4096,
    }
    write_random(
        tmp_path / "model",
        {**config, "num_hidden_layers": layers, "layer_types": ["full_attention"] * layers},
    )
    source = HFCheckpoint.open(tmp_path / "model")
    largest = max(tensor.nbytes for tensor in source.tensors.values())
    imported = import_checkpoint(tmp_path / "model", tmp_path / "megatron", Layout())
    exported = export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    _assert_same(tmp_path / "model", tmp_path / "exported")
    bound = 32 * 2**20 + 4 * largest  # the published bound's 512 MiB would hide anything here
    assert source.nbytes > 4 * bound
    for done in (imported, exported):
        assert 0 < done.peak_bytes - done.base_bytes < bound


@pytest.mark.parametrize(
    "name", ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b", "ernie45-dense"]
)
def test_streamed_keys_are_those_of_megatron_bridge(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    """What is written without a model, against what Megatron-Bridge writes of a model."""
    source = tiny(
        name, dtype="bfloat16", **({"use_bias": True} if name.startswith("ernie") else {})
    )
    import_checkpoint(source, tmp_path / "streamed", Layout(), workers=2)
    ForkLauncher(1).all(_save, source, tmp_path / "saved", Layout())
    streamed, saved = (
        pickle.loads((tmp_path / who / "iter_0000000" / ".metadata").read_bytes())
        for who in ("streamed", "saved")
    )
    assert streamed.state_dict_metadata.keys() == saved.state_dict_metadata.keys()
    for key, entry in saved.state_dict_metadata.items():
        if hasattr(entry, "size"):
            assert (
                streamed.state_dict_metadata[key].size,
                streamed.state_dict_metadata[key].properties,
            ) == (
                entry.size,
                entry.properties,
            )
    tops = [
        {path.name for path in (tmp_path / who).iterdir()} - {"hf"} for who in ("streamed", "saved")
    ]
    assert tops[0] == tops[1]
    inner = [
        {path.name for path in (tmp_path / who / "iter_0000000").iterdir()}
        for who in ("streamed", "saved")
    ]
    assert {file for file in inner[1] if not file.endswith(".distcp")} <= inner[0]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", Layout(tp=2, pp=2, vpp=2)),
        ("exaone4-1.2b", Layout(tp=4)),
        ("ernie45", Layout(tp=2, ep=2, etp=1)),
        ("ernie45-300b", Layout(pp=2, ep=2)),
    ],
    ids=str,
)
def test_what_is_streamed_loads_in_megatron_bridge(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str, layout: Layout
) -> None:
    source = tiny(name, dtype="bfloat16")
    import_checkpoint(source, tmp_path / "megatron", Layout(tp=2))
    ForkLauncher(layout.ranks).all(
        _load, source, tmp_path / "megatron", tmp_path / "exported", layout
    )
    assert compare_tensors(source, tmp_path / "exported").passed


def test_a_checkpoint_with_optimizer_states_is_read_without_them(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """As training writes it: optimizer states of the same names, in the optimizer's shards."""
    source = tiny("exaone4")
    import_checkpoint(source, tmp_path / "megatron", Layout())
    path = tmp_path / "megatron" / "iter_0000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for key, entry in list(metadata.state_dict_metadata.items()):
        if hasattr(entry, "size"):
            other = f"optimizer.state.exp_avg.{key}"
            metadata.state_dict_metadata[other] = entry
            for chunk in entry.chunks:  # in a file that is not there
                info = copy.copy(metadata.storage_data[MetadataIndex(key, chunk.offsets)])
                info.relative_path = "__9_0.distcp"
                metadata.storage_data[MetadataIndex(other, chunk.offsets)] = info
    path.write_bytes(pickle.dumps(metadata))
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    _assert_same(source, tmp_path / "exported")


def test_both_checkpoints_read_the_same_tensors(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    folder = tiny("ernie45", dtype="bfloat16")
    import_checkpoint(folder, tmp_path / "megatron", Layout())
    left = HFCheckpoint.open(folder)
    right = MegatronCheckpoint(tmp_path / "megatron", left.config)
    assert left.family is right.model.family and left.model_config == right.model.config
    assert {name for name in left.tensors if name not in right.tensors} == set(left.passthrough)
    for name, spec in right.tensors.items():
        other = left.tensors[name]
        assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == (
            name,
            other.dtype,
            other.shape,
            other.nbytes,
        )
        assert torch.equal(left.read(name), right.read(name)) and right.read(name).is_contiguous()
    assert sorted(name for group in right.groups() for name in group) == sorted(right.tensors)
