"""Planted faults: each is caught by the check that should catch it, and the first wrong layer is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnmappedTensors
from exaone_bridge.runtime.fork import RankFailure
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.workflow.verify import verify
from tests.helpers.fault_injection import assert_caught, build_with, mappings_with, provider_with

pytestmark = pytest.mark.usefixtures("references")

Plant = Callable[[pytest.MonkeyPatch], None]
BRIDGE = "exaone_bridge.bridge.ernie45:Ernie45Bridge"


def _router(arithmetic: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Plant:
    return lambda patch: patch.setattr(
        "exaone_bridge.models.ernie45.router.choose_experts", arithmetic
    )


def _sigmoid(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.sigmoid()
    experts = (scores + bias).topk(topk).indices
    chosen = scores.gather(-1, experts)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _biased(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, experts = (logits.softmax(-1) + bias).topk(topk)
    return chosen / chosen.sum(-1, keepdim=True), experts


def _unnormalised(
    logits: torch.Tensor, bias: torch.Tensor, topk: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.softmax(-1)
    experts = (scores + bias).topk(topk).indices
    return scores.gather(-1, experts), experts


def _swap_experts(model: Any) -> None:
    first, second, *_ = model[0].decoder.layers[2].mlp.experts.local_experts
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def _drop_shared(patch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    patch.setattr(SharedExpertMLP, "forward", lambda self, hidden: torch.zeros_like(hidden))


def _provider(**changes: Any) -> Plant:
    return provider_with(BRIDGE, lambda right, *args: dataclasses.replace(right(*args), **changes))


def _swap_gate_and_up(mapping: ParamMapping) -> ParamMapping:
    return (
        dataclasses.replace(mapping, hf=mapping.hf[::-1])
        if "experts.linear_fc1" in mapping.megatron
        else mapping
    )


def _low_precision_rotation(patch: pytest.MonkeyPatch) -> None:
    """Angles of queries and keys rounded to bf16, as a model that casts cos and sin would have them."""
    from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

    right = Fp32RotarySelfAttention._rotated
    patch.setattr(
        Fp32RotarySelfAttention,
        "_rotated",
        lambda self, tensor, angles, packed, which: right(
            self, tensor, angles.bfloat16().float(), packed, which
        ),
    )


FAULTS: dict[str, tuple[Plant, int]] = {  # fault, and the first layer it touches
    "sigmoid router": (_router(_sigmoid), 1),
    "bias used in the weights": (_router(_biased), 1),
    "no renormalisation": (_router(_unnormalised), 1),
    "one expert swapped": (build_with(_swap_experts), 2),
    "shared expert dropped": (_drop_shared, 1),
    "half-rotated RoPE": (_provider(rotary_interleaved=False), 0),
    "rounded angles": (_low_precision_rotation, 0),
    "gate and up of the experts swapped": (mappings_with(BRIDGE, _swap_gate_and_up), 1),
    "theta": (_provider(rotary_base=10000.0), 0),
    "epsilon": (_provider(layernorm_epsilon=1e-2), 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_located(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, layer = FAULTS[fault]
    folder = tiny("ernie45")
    plant(monkeypatch)
    assert_caught(folder, layer)


@pytest.mark.parametrize("field", ["moe_layer_end_index", "moe_layer_interval"])
def test_schedule_field_ignored(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """The tensors on disk tell, before anything runs."""
    import exaone_bridge.models.ernie45.config as module

    folder = tiny("ernie45-300b", moe_layer_end_index=5)
    right = module._schedule
    monkeypatch.setattr(
        module,
        "_schedule",
        lambda config, layers: right({k: v for k, v in config.items() if k != field}, layers),
    )
    with pytest.raises(UnmappedTensors, match="missing keys"):
        verify(folder, Layout())


def test_fault_inside_an_export_is_an_error(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron-Bridge's own ERNIE takes any ValueError for a parameter that another stage has, and says nothing."""
    from exaone_bridge.bridge.mapping_registry import SqueezedMapping

    def broken(*_: Any) -> dict[str, torch.Tensor]:
        raise ValueError("a real fault")

    monkeypatch.setattr(SqueezedMapping, "megatron_to_hf", broken)
    with pytest.raises(RankFailure, match="a real fault"):
        verify(tiny("ernie45"), Layout(pp=2))


@pytest.mark.parametrize("layout", [Layout(), Layout(ep=2)], ids=str)
def test_dropped_tensor_stops_the_export(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    from exaone_bridge.bridge.mapping_registry import SqueezedMapping

    monkeypatch.setattr(SqueezedMapping, "megatron_to_hf", lambda self, weights, module: {})
    with pytest.raises(UnmappedTensors, match="tensors were not exported") as caught:
        verify(tiny("ernie45"), layout)
    assert len(caught.value.names) == 3


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(ep=2)], ids=str)
def test_dropped_row_stops_the_load(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    mappings_with(
        BRIDGE,
        lambda mapping: None if "experts.linear_fc2.weight*" in mapping.megatron else mapping,
    )(monkeypatch)
    with pytest.raises(UnmappedTensors, match="unexpected keys") as caught:
        verify(tiny("ernie45"), layout)
    assert len(caught.value.names) in (
        8,
        12,
        16,
    )  # a rank's own layers and experts, of 3 x 8: no rank asks another
