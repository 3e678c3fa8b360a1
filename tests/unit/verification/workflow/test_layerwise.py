"""Verification layer by layer: both models as they are in one piece, and faults that it sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import exaone_bridge
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification import verify
from exaone_bridge.verification.activations.probe_points import probe_points
from exaone_bridge.verification.self_test.fault import changed_mappings
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.transformers import capture_transformers, load
from exaone_bridge.verification.workflow.transformers_layerwise import load_layerwise
from exaone_bridge.verification.workflow.workload import (
    PromptBatch,
    make_workload,
    random_prompts,
)
from tests.helpers.reports import statuses

PASSED = dict.fromkeys(("tensors", "config", "files", "logits"), "passed")


@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b"])
def test_transformers_computes_the_same_layer_by_layer(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    checkpoint = HFCheckpoint.open(tiny(name, dtype="bfloat16"))
    points, batch = probe_points(checkpoint.mappings), PromptBatch(random_prompts(387, 2, 30))
    expected = capture_transformers(load(checkpoint.folder, torch.float32), points, batch)
    model = load_layerwise(checkpoint, torch.float32)
    found = capture_transformers(model, points, batch)
    assert torch.equal(found.logits, expected.logits)
    assert list(found.values) == list(expected.values)
    assert all(torch.equal(found.values[each], expected.values[each]) for each in expected.values)
    layers = [value for each, value in model.named_parameters() if ".layers." in each]
    assert layers and all(value.is_meta for value in layers)  # the weights are freed


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", Layout(tp=2, pp=2)),
        ("exaone4-1.2b", Layout(pp=2)),
        ("ernie45", Layout(ep=2)),
        ("ernie45-300b", Layout(tp=2, ep=2, etp=1)),
    ],
    ids=str,
)
def test_layer_by_layer_passes_at_any_layout(
    name: str, layout: Layout, megatron_bridge: Any, tiny: Any
) -> None:
    report = exaone_bridge.verify(tiny(name), layout=layout, stream=True)
    assert report.passed, report.failures()
    assert statuses(report) == PASSED | {"generation": "not run"}
    assert report.setup["layer_by_layer"]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2)], ids=str)
def test_layer_by_layer_builds_multi_token_prediction(
    layout: Layout, megatron_bridge: Any, tiny: Any
) -> None:
    report = verify(tiny("exaone45"), layout=layout, stream=True, quick=True, mtp=True)
    assert statuses(report) == PASSED, report.failures()


def test_layer_by_layer_sees_a_wrong_mapping(megatron_bridge: Any, tiny: Any) -> None:
    def swap(mapping: ParamMapping) -> ParamMapping:
        if "linear_fc1.weight" not in mapping.megatron:
            return mapping
        return dataclasses.replace(mapping, hf=mapping.hf[::-1])

    with changed_mappings(EXAONE4, swap):
        report = verify(tiny("exaone4"), stream=True, quick=True)
    assert statuses(report) == PASSED | {"logits": "failed"}
    divergence = report.divergence
    assert divergence is not None and (divergence.layer, divergence.sublayer) == (0, "mlp")


def test_layer_by_layer_sees_one_bit(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.verification.workflow import megatron_layerwise

    export = megatron_layerwise.gather_hf_tensors

    def flip(parameter: Any, tensor: torch.Tensor, *args: Any) -> Any:
        if "linear_fc2.weight" in parameter.name and parameter.indices == (6,):
            tensor = (tensor.view(torch.int32) ^ 1).view(torch.float32)
        return export(parameter, tensor, *args)

    monkeypatch.setattr(megatron_layerwise, "gather_hf_tensors", flip)
    report = verify(tiny("exaone4"), stream=True, quick=True)
    assert statuses(report) == PASSED | {"tensors": "failed"}
    assert report.check("tensors").details == "model.layers.6.mlp.down_proj.weight differs"


@pytest.mark.parametrize(("stream", "layerwise"), [(None, False), (True, True), (False, False)])
def test_small_models_are_verified_as_a_whole_by_default(
    stream: bool | None, layerwise: bool, megatron_bridge: Any, tiny: Any
) -> None:
    checkpoint = HFCheckpoint.open(tiny("exaone4"))
    workload = make_workload(checkpoint, Layout(), VerifyOptions(stream=stream))
    assert workload.layerwise == layerwise
