"""Fields declared once: reading, writing, provider fields, their inverse and axis sizes follow."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_config import positive_int
from exaone_bridge.schema.hf_field import ConfigPart, hf_field


@dataclass(frozen=True, kw_only=True, slots=True)
class Part(ConfigPart):
    size: int = hf_field("hf_size", read=positive_int, provider="megatron_size", axis="S")
    blocks: tuple[int, ...] = hf_field("hf_blocks")
    steps: int = hf_field("hf_steps", read=positive_int, training=True, default=1)
    theta: float = hf_field(provider="megatron_theta")
    plain: str = "not declared"


PART = Part(size=3, blocks=(1, 2), steps=4, theta=0.5)


def test_values_from_hf() -> None:
    hf_config = {"hf_size": 3, "hf_steps": 4, "hf_blocks": "the family reads it"}
    assert Part.values_from_hf(hf_config) == {"size": 3, "steps": 4}
    with pytest.raises(UnsupportedConfig, match="hf_steps is None"):
        Part.values_from_hf({"hf_size": 3})


def test_hf_values() -> None:
    assert PART.hf_values() == {"hf_size": 3, "hf_blocks": [1, 2], "hf_steps": 4}
    assert PART.hf_values(PART) == {}
    other = Part(size=5, blocks=(1, 2), steps=9, theta=0.7)
    assert PART.hf_values(other) == {"hf_size": 3}  # steps belong to training, theta has no key
    assert PART.changed_from(other) == {"size", "steps", "theta"}
    assert PART.changed_from(None) == {"size", "blocks", "steps", "theta", "plain"}


def test_provider_fields_and_their_inverse() -> None:
    fields = PART.provider_fields()
    assert fields == {"megatron_size": 3, "megatron_theta": 0.5}
    assert Part.values_from_provider(SimpleNamespace(**fields)) == {"size": 3, "theta": 0.5}


def test_axis_sizes() -> None:
    assert PART.axis_sizes == {"S": 3}


def test_derived_class_adds_and_replaces_declarations() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Derived(Part):
        size: int = hf_field("n_embd", read=positive_int, axis="N")
        depth: int = hf_field("n_layer", read=positive_int)

    values = Derived.values_from_hf({"n_embd": 7, "n_layer": 2, "hf_steps": 1})
    assert values == {"size": 7, "steps": 1, "depth": 2}
    assert Derived(**values, blocks=(), theta=1.0).axis_sizes == {"N": 7}
