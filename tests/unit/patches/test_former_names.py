"""Megatron checkpoints of release 0.1: their run_config.yaml names former modules and fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import exaone_bridge
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.patches.former_names import with_present_names
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors

# The provider's target, its spec's target, and renamed fields, as release 0.1 wrote them.
FORMER: dict[str, tuple[str, str, dict[str, str]]] = {
    "exaone4": (
        "exaone_bridge.families.exaone4.provider.Exaone4ModelProvider",
        "exaone_bridge.families.exaone4.layer_spec.exaone4_block_spec",
        {},
    ),
    "exaone45": (
        "exaone_bridge.families.exaone45.provider.Exaone45ModelProvider",
        "exaone_bridge.families.exaone4.layer_spec.exaone4_block_spec",
        {"mtp_sliding": "mtp_windowed", "mtp_use_rope": "mtp_rotated"},
    ),
    "ernie45": (
        "exaone_bridge.families.ernie45.provider.Ernie45ModelProvider",
        "exaone_bridge.families.ernie45.layer_spec.ernie45_block_spec",
        {"mtp_layers_passthrough": "mtp_layers_carried"},
    ),
}


def _with_former_names(checkpoint: Path, name: str) -> None:
    provider, spec, fields = FORMER[name]
    (path,) = checkpoint.glob("iter_*/run_config.yaml")
    config = yaml.safe_load(path.read_text())
    model = config["model"]
    assert model.keys() >= fields.keys()
    config["model"] = {fields.get(key, key): value for key, value in model.items()} | {
        "_target_": provider,
        "transformer_layer_spec": {"_target_": spec, "_call_": False},
    }
    path.write_text(yaml.safe_dump(config))


def _load_and_save(source: Path, checkpoint: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    model = load_megatron(bridge, checkpoint, Layout())
    bridge.save_hf_pretrained(model, target, show_progress=False)


@pytest.mark.parametrize("name", FORMER)
def test_a_checkpoint_of_release_0_1_loads_exports_and_verifies(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    source, checkpoint = tiny(name), tmp_path / "megatron"
    import_checkpoint(source, checkpoint, Layout())
    _with_former_names(checkpoint, name)
    ForkLauncher().first(_load_and_save, source, checkpoint, tmp_path / "saved")
    export_checkpoint(checkpoint, tmp_path / "exported")
    for folder in ("saved", "exported"):
        assert compare_tensors(source, tmp_path / folder).passed
    assert exaone_bridge.verify(checkpoint, quick=True).passed


def test_modules_that_moved_elsewhere() -> None:
    former = {
        "exaone_bridge.families.exaone45.tower.build_tower": "models.exaone45.vision_encoder",
        "exaone_bridge.parts.moe_provider.MoEModelProvider": "modules.moe_provider",
        "exaone_bridge.parts.post_norm.PostNorm": "modules.post_norm",
        "exaone_bridge.parts.swiglu.swiglu": "modules.kernels.swiglu",
    }
    config = [{"x": {"_target_": target, "mtp_rotated": 1}} for target in former]
    for found, module in zip(with_present_names(config), former.values(), strict=True):
        assert found["x"]["_target_"].startswith(f"exaone_bridge.{module}.")
        assert found["x"]["mtp_use_rope"] == 1
    others = {"_target_": "megatron.core.x", "mtp_rotated": [1, {"a": None}], "b": "exaone_bridge."}
    assert with_present_names(others) == others
