"""The reader of run configs: the same model as Megatron-Bridge's, without Megatron-Bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from exaone_bridge.checkpoint.megatron.run_config import RUN_CONFIG, read_run_config
from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.models import FAMILIES

TINY = {name: family for family in FAMILIES for name in family.tiny}


def _write(folder: Path, model: Any) -> Path:
    from megatron.bridge.utils.yaml_utils import safe_yaml_representers

    with safe_yaml_representers():
        (folder / RUN_CONFIG).write_text(yaml.safe_dump({"model": model}))
    return folder


@pytest.mark.parametrize("name", TINY)
def test_stored_provider_describes_the_model_of_the_provider(
    megatron_bridge: dict[str, Any], name: str, tmp_path: Path
) -> None:
    family = TINY[name]
    bridge = megatron_bridge[family.architectures[0]]
    hf_config = dict(family.tiny[name])
    provider = bridge.provider_of(family.read_hf_config(hf_config), hf_config)
    provider.rotary_base = 123457.0  # a change that only the provider has
    stored = read_run_config(_write(tmp_path, provider.to_cfg_dict()))
    assert stored.family is family
    assert family.model_config_of(stored) == family.model_config_of(provider)
    assert stored.hf_config() == bridge.config_json_of(provider) != hf_config


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        ({"_target_": "megatron.bridge.models.llama.LlamaModelProvider"}, "LlamaModelProvider"),
        ({}, "model is 'None'"),
        ("text", "describes no model"),
        ({"_target_": TINY["exaone4"].provider_class}, "field rope_scaling_factor is missing"),
    ],
)
def test_damaged_run_config_is_rejected(
    megatron_bridge: object, model: Any, fault: str, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, UnsupportedConfig), match=fault):
        read_run_config(_write(tmp_path, model)).hf_config()


def test_malformed_field_is_rejected(megatron_bridge: dict[str, Any], tmp_path: Path) -> None:
    family = TINY["exaone4"]
    hf_config = dict(family.tiny["exaone4"])
    bridge = megatron_bridge[family.architectures[0]]
    fields = bridge.provider_of(family.read_hf_config(hf_config), hf_config).to_cfg_dict()
    stored = read_run_config(_write(tmp_path, fields | {"no_rope_freq": 4}))
    with pytest.raises(CheckpointError, match="a field of the model is malformed"):
        stored.hf_config()


def test_fields_that_a_provider_has_got_since_may_be_missing(
    megatron_bridge: dict[str, Any], tmp_path: Path
) -> None:
    family = TINY["exaone4"]
    hf_config = dict(family.tiny["exaone4"])
    bridge = megatron_bridge[family.architectures[0]]
    fields = bridge.provider_of(family.read_hf_config(hf_config), hf_config).to_cfg_dict()
    assert fields.pop("head") == {}
    assert read_run_config(_write(tmp_path, fields)).hf_config() == hf_config
