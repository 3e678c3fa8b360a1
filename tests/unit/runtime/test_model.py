"""A Megatron checkpoint is used in bf16 and without CUDA graphs, however its run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from exaone_bridge import import_checkpoint
from exaone_bridge.recipes import recipe
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout

TRAINED: dict[str, Any] = {
    "cuda_graph_impl": "transformer_engine",
    "use_te_rng_tracker": True,
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "moe_router_padding_for_quantization": True,
    "fuse_weight_gradients": True,
}


def _requested(source: Path, megatron: Path) -> dict[str, Any]:
    """On a rank: the fields of a loaded model, before the torch backend changes them."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    (model,) = load_megatron(AutoBridge.from_hf_pretrained(source), megatron, Layout())
    return {name: model.config._as_requested(name) for name in TRAINED}


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_training_fields_do_not_reach_a_loaded_model(
    name: str, megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    from megatron.bridge.utils.yaml_utils import safe_yaml_representers

    source, megatron = tiny(name), tmp_path / "megatron"
    import_checkpoint(source, megatron)
    (file,) = megatron.rglob("run_config.yaml")
    config = yaml.safe_load(file.read_text())
    trained = recipe("ernie45_tiny_pretrain_config")(cuda_graphs="layers").model.to_cfg_dict()
    config["model"] |= TRAINED | {"cuda_graph_modules": trained["cuda_graph_modules"]}
    with safe_yaml_representers():
        file.write_text(yaml.safe_dump(config))
    found = ForkLauncher().first(_requested, source, megatron)
    assert found["cuda_graph_impl"] == "none" and not found["fuse_weight_gradients"]
    assert found["fp8"] is None and not found["moe_router_padding_for_quantization"]
