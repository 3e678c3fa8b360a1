"""Loads and exports through AutoBridge equal those of Megatron-Bridge's own code, bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import BridgeError
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_files, compare_tensors
from tests.helpers.damage import INDEX
from tests.helpers.unloaded import named_parameters, unloaded_model, unwrap_model

FULL = "full_attention"
EIGHT_LAYERS = {"num_hidden_layers": 8, "layer_types": [FULL] * 8}
LAYOUTS = [Layout(), Layout(tp=4), Layout(tp=2, pp=2, vpp=2), Layout(pp=4, vpp=2)]
EXPERT_LAYOUTS = [Layout(tp=2, ep=4, etp=1), Layout(pp=2, ep=2, etp=2)]
CASES = [
    *(("exaone4", {}, None, layout) for layout in LAYOUTS),
    *(("exaone4-1.2b", EIGHT_LAYERS | {"dtype": "bfloat16"}, None, layout) for layout in LAYOUTS),
    ("exaone4-1.2b", EIGHT_LAYERS | {"dtype": "bfloat16"}, torch.float32, Layout(tp=2)),
    ("exaone4", {"dtype": "float16"}, None, Layout(tp=2)),
    *(
        ("ernie45", {"dtype": "bfloat16", "use_bias": True}, None, layout)
        for layout in [*LAYOUTS[:2], *EXPERT_LAYOUTS]
    ),
    *(
        ("ernie45-300b", {"use_bias": True}, None, layout)
        for layout in [*LAYOUTS[2:], *EXPERT_LAYOUTS]
    ),
    ("ernie45-dense", {"use_bias": True}, None, Layout(tp=2, pp=2)),
]


def _load_and_save_twice(
    folder: Path, work: Path, layout: Layout, dtype: torch.dtype | None
) -> tuple[int, list[Any], Any]:
    """Load and save with the reshard plan, and with Megatron-Bridge's own code.

    Returns:
        The number of this rank's tensors, those that differ between the two loads, and the reason
        why the plan does not support the model, which must be None.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    from exaone_bridge.bridge.eligibility import why_not_planned

    found = []
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, layout, dtype)
    for load in (None, bridge.load_hf_weights):
        with torch.no_grad():
            for tensor in named_parameters(model).values():
                tensor.fill_(float("nan"))  # a load must fill every element
        if load is not None:
            load(model)
        else:
            MegatronModelBridge.load_weights_hf_to_megatron(
                bridge._model_bridge, bridge.hf_pretrained, model
            )
        found.append(
            {key: tensor.detach().clone() for key, tensor in named_parameters(model).items()}
        )
    generic, planned = found
    assert planned.keys() == generic.keys()
    AutoBridge.save_hf_weights.__wrapped__(bridge, model, work / "generic", show_progress=False)
    bridge.save_hf_pretrained(model, work / "planned", show_progress=False)
    differ = [key for key in planned if not torch.equal(planned[key], generic[key])]
    return len(planned), differ, why_not_planned(bridge._model_bridge, model)


@pytest.mark.parametrize(("name", "fields", "dtype", "layout"), CASES, ids=str)
def test_load_and_save_equal_those_of_megatron_bridge(
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    name: str,
    fields: dict[str, Any],
    dtype: torch.dtype | None,
    layout: Layout,
) -> None:
    source = tiny(name, **fields)
    results = ForkLauncher(layout.ranks).all(_load_and_save_twice, source, tmp_path, layout, dtype)
    assert [(differ, why) for _, differ, why in results] == [([], None)] * layout.ranks
    assert all(count > 8 for count, _, _ in results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generic", "planned"]
    same = compare_tensors(tmp_path / "generic", tmp_path / "planned")
    assert same.passed, same.details
    files = compare_files(source, tmp_path / "planned")
    assert files.passed, files.details
    if dtype is None:
        assert compare_tensors(source, tmp_path / "planned").passed


def _count_descriptions(folder: Path, target: Path) -> list[int]:
    """Count how often the model is described during a load, an export and a save."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.schema.model_family import ModelFamily

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, Layout())
    counts = []
    for call in (
        lambda: bridge.load_hf_weights(model),
        lambda: list(bridge.export_hf_weights(model, cpu=True, show_progress=False)),
        lambda: bridge.save_hf_pretrained(model, target, show_progress=False),
    ):
        with mock.patch.object(
            ModelFamily, "describe", autospec=True, side_effect=ModelFamily.describe
        ) as describe:
            call()
        counts.append(describe.call_count)
    return counts


def test_model_is_described_once_per_call(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    """A load describes the folder too, because AutoBridge's config may have another dtype."""
    folder, target = tiny("exaone45"), tmp_path / "saved"
    assert ForkLauncher().first(_count_descriptions, folder, target) == [2, 1, 1]


def _load_into(folder: Path, layout: Layout, fields: dict[str, Any], change: str) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, layout, **fields)
    mlp = unwrap_model(model)[0].decoder.layers[0].mlp
    # Only the last rank's model is wrong.
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        if change == "extra":
            mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
        if change == "missing":
            del mlp.linear_fc1.weight
    bridge.load_hf_weights(model)


MISMATCHES: dict[str, tuple[dict[str, Any], str, str]] = {
    "fewer layers": (
        {"num_layers": 6, "window_attn_skip_freq": None, "no_rope_freq": None},
        "",
        "has the layers",
    ),
    "more layers": (
        {"num_layers": 10, "window_attn_skip_freq": None, "no_rope_freq": None},
        "",
        "has the layers",
    ),
    "another width": ({"ffn_hidden_size": 128}, "", "and the config makes it"),
    "one parameter missing": (
        {},
        "missing",
        r"missing keys \(decoder\.layers\.4\.mlp\.linear_fc1\.weight\)",
    ),
    "one extra parameter": ({}, "extra", r"unexpected keys \(decoder\.layers\.4\.mlp\.extra\)"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_load_into_a_model_of_another_config_is_rejected(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    fields, change, message = MISMATCHES[name]
    with pytest.raises(BridgeError, match=message):
        ForkLauncher(2).all(_load_into, tiny("exaone4"), Layout(pp=2), fields, change)


def _save_twice(folder: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = unloaded_model(bridge, Layout(tp=2))
    bridge.save_hf_weights(model, target / "random", show_progress=False)
    bridge.load_hf_weights(model)
    bridge.save_hf_weights(model, target / "there", show_progress=False)
    bridge.save_hf_pretrained(model, target / "random", show_progress=False)


def test_save_into_an_existing_folder_replaces_the_weights_only(
    megatron_bridge: Any, sharded: Path, tmp_path: Path
) -> None:
    """AutoBridge's calls may write into an existing folder, and rename complete files."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    ForkLauncher(2).all(_save_twice, sharded, tmp_path)
    for name in ("random", "there"):
        assert compare_tensors(sharded, tmp_path / name).passed
        index = json.loads((tmp_path / name / INDEX).read_text())
        assert index == json.loads((sharded / INDEX).read_text())
    assert (tmp_path / "there" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["random", "there"]
