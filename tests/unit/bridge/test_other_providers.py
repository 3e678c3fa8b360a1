"""Providers of Megatron-Bridge's own bridges, as its checkpoints have them, and its field names."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.patches.former_names import with_present_names
from exaone_bridge.verification.checks.folders import compare_configs

THEIRS = {
    "ernie45-300b": ("ernie.ernie_45_bridge", "Ernie45Bridge"),
    "exaone45": ("exaone.exaone45.exaone45_bridge", "Exaone45Bridge"),
    "exaone-moe": ("exaone.exaone_moe.exaone_moe_bridge", "ExaoneMoeBridge"),
}


def _their_provider(module: str, name: str, hf_pretrained: Any) -> Any:
    bridge = getattr(importlib.import_module(f"megatron.bridge.models.{module}"), name)()
    bridge.hf_pretrained, bridge.hf_config = hf_pretrained, hf_pretrained.config
    return bridge.provider_bridge(hf_pretrained)


def test_an_exaone4_provider_of_megatron_bridge_is_converted(
    megatron_bridge: Any, tiny: Any
) -> None:
    from megatron.bridge import AutoBridge

    source = tiny("exaone4-1.2b")
    ours = AutoBridge.from_hf_pretrained(source)
    theirs = _their_provider("exaone.exaone4.exaone4_bridge", "Exaone4Bridge", ours.hf_pretrained)
    converted = ours._model_bridge.megatron_to_hf_config(theirs)
    expected = ours._model_bridge.megatron_to_hf_config(ours.to_megatron_provider())
    before = read_json(source / "config.json")
    shared = {name: value for name, value in expected.items() if name in converted}
    assert compare_configs(shared, converted).passed and len(shared) > 15
    assert converted["rope_parameters"] == before["rope_parameters"]
    theirs.gated_linear_unit = False
    with pytest.raises(UnsupportedConfig, match="does not import exaone_bridge"):
        ours._model_bridge.megatron_to_hf_config(theirs)


@pytest.mark.parametrize("name", THEIRS)
def test_other_providers_of_megatron_bridge_are_rejected_in_one_sentence(
    megatron_bridge: Any, tiny: Any, name: str
) -> None:
    from megatron.bridge import AutoBridge

    ours = AutoBridge.from_hf_pretrained(tiny(name))
    try:
        theirs = _their_provider(*THEIRS[name], ours.hf_pretrained)
    except Exception:  # Megatron-Bridge's own cannot read every config of ours
        theirs = SimpleNamespace(num_layers=4)
    with pytest.raises(UnsupportedConfig) as raised:
        ours._model_bridge.megatron_to_hf_config(theirs)
    message = str(raised.value)
    assert len(message.splitlines()) == 1 and type(theirs).__qualname__ in message
    assert "does not import exaone_bridge" in message


def test_megatron_bridges_name_of_the_original_context_is_ours(
    megatron_bridge: Any, tiny: Any
) -> None:
    """Setting it changes the exported config; checkpoints with the former name still load."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(tiny("exaone4-1.2b"))
    provider = bridge.to_megatron_provider()
    provider.rope_scaling_original_max_position_embeddings = 32
    config = bridge._model_bridge.megatron_to_hf_config(provider)
    assert config["rope_parameters"]["original_max_position_embeddings"] == 32
    former = {"_target_": "exaone_bridge.x", "rope_scaling_original_max_positions": 16}
    assert with_present_names(former)["rope_scaling_original_max_position_embeddings"] == 16
