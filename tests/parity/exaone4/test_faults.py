"""Planted faults: each is caught by the check that should catch it, and the first wrong layer is named.

A fault in a table of rows or in a schedule is the same in both directions, so the round trip stays bitwise equal and
only the logits can tell. Ranks are forked from this process and inherit what is planted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from exaone_bridge.errors import UnmappedTensors, UnsupportedConfig
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.workflow.verify import verify
from tests.helpers.fault_injection import assert_caught, build_with, mappings_with, provider_with

pytestmark = pytest.mark.usefixtures("references")

Plant = Callable[[pytest.MonkeyPatch], None]
BRIDGE = "exaone_bridge.bridge.exaone4:Exaone4Bridge"


def _rows(change: Callable[[ParamMapping], ParamMapping | None]) -> Plant:
    return mappings_with(BRIDGE, change)


def _model_config(**changes: Callable[[Any], Any]) -> Plant:
    """Facts misread on their way to the provider."""

    def misread(right: Any, model_config: Any, hf_config: Any) -> Any:
        wrong = {name: change(getattr(model_config, name)) for name, change in changes.items()}
        return right(dataclasses.replace(model_config, **wrong), hf_config)

    return provider_with(BRIDGE, misread)


def _reorder(megatron: str, *order: int) -> Plant:
    def change(mapping: ParamMapping) -> ParamMapping:
        if megatron not in mapping.megatron:
            return mapping
        return dataclasses.replace(mapping, hf=tuple(mapping.hf[number] for number in order))

    return _rows(change)


def _swap_post_norms(mapping: ParamMapping) -> ParamMapping:
    names = ("post_attention_layernorm", "post_feedforward_layernorm")
    for this, other in (names, names[::-1]):
        if this in mapping.hf[0].name:
            tensor = dataclasses.replace(
                mapping.hf[0], name=mapping.hf[0].name.replace(this, other)
            )
            return dataclasses.replace(mapping, hf=(tensor,))
    return mapping


def _window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    import exaone_bridge.models.exaone4.provider as module

    right = module.megatron_window
    patch.setattr(module, "megatron_window", lambda windows: ((windows[0], 0), right(windows)[1]))


def _rope(change: Callable[[list[int]], list[int]]) -> Plant:
    """Another `no_rope_freq`. Our own export would refuse it, having no words for it: here it is told the source's."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        import exaone_bridge.models.exaone4.provider as module
        from exaone_bridge.bridge.exaone4 import Exaone4Bridge

        right = module.megatron_rope
        patch.setattr(module, "megatron_rope", lambda rope: change(right(rope)))
        patch.setattr(
            Exaone4Bridge,
            "megatron_to_hf_config",
            staticmethod(lambda provider: provider.hf_config),
        )

    return plant


def _flip(layer: int, window: int | None) -> Plant:
    """A layer's type: its window and its RoPE."""

    def at(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
        return (*values[:layer], value, *values[layer + 1 :])

    return _model_config(
        windows=lambda windows: at(windows, window), rope=lambda rope: at(rope, window is not None)
    )


def _permute_heads(model: Any) -> None:
    weight = model[0].decoder.layers[2].self_attention.linear_qkv.weight
    weight[:48] = weight[:48].roll(24, dims=0)  # two query heads of the first group change places


def _post_norm_epsilon(patch: pytest.MonkeyPatch) -> None:
    """Megatron-Core's default epsilon in the post norms alone, as in Megatron-Bridge 0.6.2."""
    from exaone_bridge.modules import post_norm

    class Forgetful(post_norm.TorchRMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
            super().__init__(config, hidden_size)

    patch.setattr(post_norm.RowParallelLinearLayerNorm, "norm", Forgetful)


FAULTS: dict[str, tuple[Plant, int]] = {  # fault, and the first layer it touches
    "window off by one": (_window_off_by_one, 0),
    "NoPE inverted": (_rope(lambda none: [1 - one for one in none]), 0),
    "gate and up swapped": (_reorder("linear_fc1", 1, 0), 0),
    "k and v swapped": (_reorder("linear_qkv", 0, 2, 1), 0),
    "a head permuted": (build_with(_permute_heads), 2),
    "post norms swapped": (_rows(_swap_post_norms), 0),
    "epsilon": (_model_config(norm_eps=lambda eps: eps / 30), 0),
    "epsilon of the post norms": (_post_norm_epsilon, 0),
    "factor": (_model_config(llama3=lambda rope: dataclasses.replace(rope, factor=8.0)), 0),
    "low frequency factor": (
        _model_config(llama3=lambda rope: dataclasses.replace(rope, low_freq_factor=2.0)),
        0,
    ),
    "theta": (_model_config(rope_theta=lambda theta: theta * 1.01), 0),
    "layer 5 made global": (_flip(5, None), 5),
    "layer 3 made sliding": (_flip(3, 8), 3),
    "RoPE on layer 7": (_rope(lambda none: [*none[:7], 0]), 7),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught_and_located(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant, layer = FAULTS[fault]
    folder = tiny("exaone4")
    plant(monkeypatch)
    assert_caught(folder, layer)


def test_dropped_row_stops_the_load(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rows(lambda mapping: None if "down_proj" in mapping.hf[0].name else mapping)(monkeypatch)
    with pytest.raises(UnmappedTensors, match="unexpected keys") as caught:
        verify(tiny("exaone4"), Layout(pp=2))
    names = [f"decoder.layers.{n}.mlp.linear_fc2.weight" for n in range(8)]
    assert list(caught.value.names) in (names[:4], names[4:])  # a stage's own: no rank asks another


def test_row_without_its_parameter_stops_the_load(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_qk_norm(right: Any, *args: Any) -> Any:
        provider = right(*args)
        spec = provider.transformer_layer_spec

        def bare(config: Any, vp_stage: int | None = None) -> Any:
            block = spec(config, vp_stage)
            for layer in block.layer_specs:
                layer.submodules.self_attention.submodules.q_layernorm = None
                layer.submodules.self_attention.submodules.k_layernorm = None
            return block

        provider.qk_layernorm, provider.transformer_layer_spec = False, bare
        return provider

    provider_with(BRIDGE, without_qk_norm)(monkeypatch)
    with pytest.raises(UnmappedTensors, match="missing keys"):
        verify(tiny("exaone4"), Layout())


def test_dropped_tensor_stops_the_export(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping that yields nothing for one parameter: the host would leave the tensor out and say nothing."""
    from megatron.bridge.models.conversion.param_mapping import RowParallelMapping

    monkeypatch.setattr(RowParallelMapping, "megatron_to_hf", lambda self, weights, module: {})
    with pytest.raises(UnmappedTensors, match="tensors were not exported"):
        verify(tiny("exaone4"), Layout())


def test_unsayable_schedule_stops_the_export(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "exaone_bridge.models.exaone4.provider.megatron_rope", lambda rope: [1] * len(rope)
    )
    with pytest.raises(UnsupportedConfig, match="no_rope_freq"):
        verify(tiny("exaone4"), Layout())
