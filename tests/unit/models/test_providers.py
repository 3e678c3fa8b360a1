"""A model provider has the full model config: the two conversions are inverse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from exaone_bridge.models import FAMILIES
from tests.helpers.exaone4_configs import PUBLISHED_MODEL_CONFIGS

TINY = {name: family for family in FAMILIES for name in family.tiny}


def _round_trip(architecture: str, model_config: Any, hf_config: Any) -> Any:
    from exaone_bridge import supported

    bridge = supported()[architecture]
    provider = bridge.provider_of(model_config, hf_config)
    assert provider.hf_config == hf_config
    return bridge.FAMILY.model_config_of(provider)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_provider_round_trip(megatron_bridge: Any, name: str, dtype: str) -> None:
    family = TINY[name]
    hf_config = dict(family.tiny[name])
    model_config = dataclasses.replace(family.read_hf_config(hf_config), dtype=dtype)
    assert _round_trip(family.architectures[0], model_config, hf_config) == model_config
    without = family.without_passthrough(model_config)
    assert _round_trip(family.architectures[0], without, hf_config) == without


@pytest.mark.parametrize("name", PUBLISHED_MODEL_CONFIGS)
def test_published_provider_round_trip(megatron_bridge: Any, name: str) -> None:
    model_config = PUBLISHED_MODEL_CONFIGS[name]
    assert _round_trip("Exaone4ForCausalLM", model_config, {}) == model_config
