"""Injected faults of ERNIE 4.5: each is caught by the checks that must fail, and located."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import UnmappedTensors
from exaone_bridge.models.ernie45 import ERNIE45, config
from exaone_bridge.runtime.fork import RankFailure
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.self_test.fault import Fault, changed_mappings
from tests.helpers.faults import Injections, assert_caught, assert_clean, export, fault_params

MODEL = "ernie45"


@pytest.mark.parametrize("fault", fault_params(MODEL))
def test_fault_is_caught_and_located(inject: Injections, fault: Fault) -> None:
    assert_caught(inject(fault))


def test_model_without_a_fault_passes(inject: Injections) -> None:
    assert_clean(inject.findings(MODEL))


@pytest.mark.parametrize(
    ("field", "default"), [("moe_layer_end_index", -1), ("moe_layer_interval", 1)]
)
def test_ignored_schedule_field_stops_the_load(
    megatron_bridge: Any, tiny: Any, field: str, default: int
) -> None:
    """The tensors on disk show it before anything runs."""
    folder = tiny("ernie45-300b", moe_layer_end_index=5)
    original = config._layer_mask

    def layer_mask(hf_config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
        return original({**hf_config, field: default}, num_layers)

    with (
        mock.patch.object(config, "_layer_mask", layer_mask),
        pytest.raises(UnmappedTensors, match="missing keys"),
    ):
        export(folder, Layout())


def test_error_inside_an_export_is_raised(megatron_bridge: Any, tiny: Any) -> None:
    """Megatron-Bridge's ERNIE bridge takes any ValueError for a parameter of another stage."""
    from exaone_bridge.bridge.mapping_registry import SqueezedMapping

    def broken(*_: Any) -> dict[str, torch.Tensor]:
        raise ValueError("an injected error")

    with (
        mock.patch.object(SqueezedMapping, "megatron_to_hf", broken),
        pytest.raises(RankFailure, match="an injected error"),
    ):
        export(tiny(MODEL), Layout(pp=2))


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2)], ids=str)
def test_tensor_missing_from_the_stream_stops_the_export(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    from exaone_bridge.bridge.mapping_registry import SqueezedMapping

    with (
        mock.patch.object(SqueezedMapping, "megatron_to_hf", return_value={}),
        pytest.raises(UnmappedTensors, match="tensors were not exported") as caught,
    ):
        export(tiny(MODEL), layout)
    assert len(caught.value.names) == 3


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(ep=2)], ids=str)
def test_missing_mapping_stops_the_load(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    with (
        changed_mappings(
            ERNIE45,
            lambda mapping: None if "experts.linear_fc2.weight*" in mapping.megatron else mapping,
        ),
        pytest.raises(UnmappedTensors, match="unexpected keys") as caught,
    ):
        export(tiny(MODEL), layout)
    # Every rank checks the whole folder, which has three layers with eight experts.
    assert len(caught.value.names) == 3 * 8
