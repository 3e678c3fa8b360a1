"""The planned load against the host's own loader with our mappings, bit by bit, on every rank; and its fallbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.host.world import run_ranks
from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.folders import compare_files, compare_tensors

FULL = "full_attention"
LLAMA = {"num_hidden_layers": 8, "layer_types": [FULL] * 8}
EVEN = [Layout(), Layout(tp=4), Layout(tp=2, pp=2, vpp=2), Layout(pp=4, vpp=2)]
EXPERTS = [Layout(tp=2, ep=4, etp=1), Layout(pp=2, ep=2, etp=2)]
CASES = [
    *(("exaone4", {}, None, layout) for layout in EVEN),
    *(("exaone4-1.2b", LLAMA | {"dtype": "bfloat16"}, None, layout) for layout in EVEN),
    ("exaone4-1.2b", LLAMA | {"dtype": "bfloat16"}, torch.float32, Layout(tp=2)),
    ("exaone4", {"dtype": "float16"}, None, Layout(tp=2)),
    *(("ernie45", {"dtype": "bfloat16", "use_bias": True}, None, layout) for layout in [*EVEN[:2], *EXPERTS]),
    *(("ernie45-300b", {"use_bias": True}, None, layout) for layout in [*EVEN[2:], *EXPERTS]),
    ("ernie45-dense", {"use_bias": True}, None, Layout(tp=2, pp=2)),
]


def unfilled(bridge: Any, layout: Layout, dtype: torch.dtype | None = None, **fields: Any) -> list[Any]:
    """A model at this layout whose weights are not the checkpoint's."""
    from exaone_bridge.host.model import model_parallel_of

    provider = bridge.to_megatron_provider(load_weights=False)
    dtype = dtype or provider.params_dtype
    fields = model_parallel_of(layout) | {"pipeline_dtype": dtype, "autocast_dtype": dtype} | fields
    provider.apply_overrides_and_finalize(dtype, fields)
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def everything(model: list[Any]) -> dict[tuple[int, str], torch.Tensor]:
    from exaone_bridge.host.planned import parameters_of

    return {(chunk, name): tensor for chunk, name, tensor in parameters_of(model)}


def _both_ways(folder: Path, work: Path, layout: Layout, dtype: torch.dtype | None) -> tuple[int, list[Any], Any]:
    """How many tensors this rank has, those in which the two loads differ (NaN before either), and why not planned."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    from exaone_bridge.host.planned import why_not

    found = []
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unfilled(bridge, layout, dtype)
    for load in (None, bridge.load_hf_weights):
        with torch.no_grad():
            for tensor in everything(model).values():
                tensor.fill_(float("nan"))
        if load is not None:
            load(model)
        else:
            MegatronModelBridge.load_weights_hf_to_megatron(bridge._model_bridge, bridge.hf_pretrained, model)
        found.append({key: tensor.detach().clone() for key, tensor in everything(model).items()})
    generic, planned = found
    assert planned.keys() == generic.keys()
    AutoBridge.save_hf_weights.__wrapped__(bridge, model, work / "generic", show_progress=False)
    bridge.save_hf_pretrained(model, work / "planned", show_progress=False)
    differ = [key for key in planned if not torch.equal(planned[key], generic[key])]
    return len(planned), differ, why_not(bridge._model_bridge, model)


@pytest.mark.parametrize(("name", "fields", "dtype", "layout"), CASES, ids=str)
def test_loads_and_exports_are_the_hosts(
    host: Any,
    tiny: Any,
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    dtype: torch.dtype | None,
    layout: Layout,
) -> None:
    source = tiny(name, **fields)
    results = run_ranks(_both_ways, layout.ranks, source, tmp_path, layout, dtype)
    assert [(differ, why) for _, differ, why in results] == [([], None)] * layout.ranks
    assert all(count > 8 for count, _, _ in results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generic", "planned"]
    same = compare_tensors(tmp_path / "generic", tmp_path / "planned")
    assert same.holds, same.where
    files = compare_files(source, tmp_path / "planned")
    assert files.holds, files.where
    if dtype is None:
        assert compare_tensors(source, tmp_path / "planned").holds
