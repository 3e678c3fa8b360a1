"""`torch_dtype=` of AutoBridge, in every family: another than the checkpoint's, and "auto"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout

FAMILIES = ["exaone4", "ernie45", "exaone45", "exaone-moe"]


def _load(source: Path, target: Path, dtype: Any) -> set[torch.dtype]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(source, torch_dtype=dtype)
    model = build(bridge, Layout())
    bridge.save_hf_weights(model, target, show_progress=False)
    return {parameter.dtype for chunk in model for parameter in chunk.parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_another_dtype_is_that_of_the_whole_model(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    source = tiny(name)
    found = ForkLauncher().first(_load, source, tmp_path / "out", torch.bfloat16)
    assert torch.bfloat16 in found
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key].to(tensor.dtype)), key
    assert sum(tensor.dtype is torch.bfloat16 for tensor in after.values()) > len(after) / 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_the_dtype_of_the_checkpoint(
    megatron_bridge: Any, tiny: Any, name: str, dtype: str
) -> None:
    from megatron.bridge import AutoBridge

    source = tiny(name) if dtype == "float32" or name == "exaone45" else tiny(name, dtype=dtype)
    wanted = AutoBridge.from_hf_pretrained(source).to_megatron_provider().params_dtype
    for argument in ("torch_dtype", "dtype"):
        bridge = AutoBridge.from_hf_pretrained(source, **{argument: "auto"})
        assert bridge.to_megatron_provider().params_dtype is wanted
    assert wanted is (torch.float32 if name == "exaone45" else getattr(torch, dtype))
