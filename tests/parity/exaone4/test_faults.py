"""Injected faults of EXAONE 4.0: each is caught by the checks that must fail, and located.

A fault in a parameter mapping or a layer schedule is the same in both directions, so that the round
trip stays bitwise equal and only the logits show it.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest

from exaone_bridge.errors import UnmappedTensors
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.self_test.fault import Fault, changed_mappings
from tests.helpers.faults import Injections, assert_caught, assert_clean, export, fault_params

MODEL = "exaone4"


@pytest.mark.parametrize("fault", fault_params(MODEL))
def test_fault_is_caught_and_located(inject: Injections, fault: Fault) -> None:
    assert_caught(inject(fault))


def test_model_without_a_fault_passes(inject: Injections) -> None:
    assert_clean(inject.findings(MODEL))


def test_rejected_export_names_the_field(inject: Injections) -> None:
    findings = inject.findings(MODEL, "RoPE in every layer")
    assert "no_rope_freq" in next(check.details for check in findings.checks if not check.passed)


def test_missing_mapping_stops_the_load(megatron_bridge: Any, tiny: Any) -> None:
    with (
        changed_mappings(
            EXAONE4, lambda mapping: None if "down_proj" in mapping.hf[0].name else mapping
        ),
        pytest.raises(UnmappedTensors, match="unexpected keys") as caught,
    ):
        export(tiny(MODEL), Layout(pp=2))
    names = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(8)]
    assert list(caught.value.names) == names  # the folder is checked before the model's parameters


def test_mapping_without_its_parameter_stops_the_load(megatron_bridge: Any, tiny: Any) -> None:
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge

    def without_qk_norm(original: Any, *args: Any) -> Any:
        provider = original(*args)
        spec = provider.transformer_layer_spec

        def bare(config: Any, vp_stage: int | None = None) -> Any:
            block = spec(config, vp_stage)
            for layer in block.layer_specs:
                layer.submodules.self_attention.submodules.q_layernorm = None
                layer.submodules.self_attention.submodules.k_layernorm = None
            return block

        provider.qk_layernorm, provider.transformer_layer_spec = False, bare
        return provider

    changed = functools.partial(without_qk_norm, Exaone4Bridge.provider_of)
    with (
        mock.patch.object(Exaone4Bridge, "provider_of", staticmethod(changed)),
        pytest.raises(UnmappedTensors, match="missing keys"),
    ):
        export(tiny(MODEL), Layout())


def test_tensor_missing_from_the_stream_stops_the_export(megatron_bridge: Any, tiny: Any) -> None:
    """Megatron-Bridge 0.6.2 silently omits a parameter for which a mapping returns nothing."""
    from megatron.bridge.models.conversion.param_mapping import RowParallelMapping

    with (
        mock.patch.object(RowParallelMapping, "megatron_to_hf", return_value={}),
        pytest.raises(UnmappedTensors, match="tensors were not exported"),
    ):
        export(tiny(MODEL), Layout())
