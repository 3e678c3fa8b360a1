"""EXAONE 4.0's config against Transformers' own reader."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exaone_bridge.models.exaone4.config import Exaone4ModelConfig, read_hf_config, write_hf_config
from exaone_bridge.models.exaone4.tiny import TINY
from tests.helpers.exaone4_configs import (
    LLAMA3_KEYS,
    PLAIN_FIELDS,
    PUBLISHED,
    PUBLISHED_MODEL_CONFIGS,
    TRAINING_FIELDS,
    VERSIONS,
    G,
    L,
    model_config,
    published,
    raw_configs,
    small,
)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def hf() -> Any:
    """Transformers' Exaone4Config, on copies: it writes into the dictionaries that it is given."""
    from transformers.models.exaone4.configuration_exaone4 import Exaone4Config

    return lambda config: Exaone4Config(**copy.deepcopy(config))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_through_transformers(hf: Any, name: str, version: str) -> None:
    config = hf(published(name, version))
    for text in (config.to_json_string(), config.to_json_string(use_diff=False)):
        assert read_hf_config(json.loads(text)) == PUBLISHED_MODEL_CONFIGS[name]
    assert read_hf_config(config.to_dict()) == PUBLISHED_MODEL_CONFIGS[name]


@quick
@given(config=raw_configs())
@example(config={})
@example(config={"num_hidden_layers": 7})
@example(config={"layer_types": [G] * 32, "sliding_window": None})
def test_any_config_through_transformers(hf: Any, config: dict[str, Any]) -> None:
    reference, found = hf(config), read_hf_config(config)
    assert read_hf_config(json.loads(reference.to_json_string())) == found
    assert read_hf_config(reference.to_dict()) == found
    # Not only equal to our own reading: equal to Transformers' attributes.
    assert found.num_layers == reference.num_hidden_layers == len(reference.layer_types)
    assert [L if window is not None else G for window in found.windows] == reference.layer_types
    assert {window for window in found.windows if window is not None} <= {reference.sliding_window}
    assert found.rope == tuple(
        reference.sliding_window is None or kind == L for kind in reference.layer_types
    )
    rope = reference.rope_parameters
    assert found.rope_theta == rope["rope_theta"]
    assert (found.llama3 is not None) == (rope["rope_type"] == "llama3")
    if found.llama3 is not None:
        assert dataclasses.astuple(found.llama3) == tuple(rope[key] for key in LLAMA3_KEYS.values())
    derived = reference.hidden_size // reference.num_attention_heads
    assert found.head_dim == getattr(reference, "head_dim", derived)
    assert found.dtype == str(reference.dtype or "float32").removeprefix("torch.")
    for name, (key, _) in (PLAIN_FIELDS | TRAINING_FIELDS).items():
        if name != "head_dim":
            assert getattr(found, name) == getattr(reference, key), key


@settings(max_examples=60, deadline=None)
@given(pattern=st.integers(1, 40), layers=st.integers(1, 40))
@example(pattern=1, layers=3)
@example(pattern=4, layers=7)
@example(pattern=9, layers=4)
def test_pattern_is_read_as_in_transformers(hf: Any, pattern: int, layers: int) -> None:
    config = small(num_hidden_layers=layers, sliding_window_pattern=pattern, layer_types=...)
    kinds = hf(config).layer_types
    assert read_hf_config(config).windows == tuple(5 if kind == L else None for kind in kinds)
    assert read_hf_config(config | {"layer_types": None}) == read_hf_config(config)
    explicit = config | {"layer_types": kinds, "sliding_window_pattern": "LLLG"}
    assert read_hf_config(config) == read_hf_config(explicit)


def _without_version(text: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(text).items() if key != "transformers_version"}


@pytest.mark.parametrize("name", TINY)
def test_tiny_config_is_what_transformers_writes(hf: Any, name: str) -> None:
    assert _without_version(hf(TINY[name]).to_json_string()) == TINY[name]


@pytest.mark.parametrize(("name", "full_name"), [("exaone4", "32B"), ("exaone4-1.2b", "1.2B")])
def test_tiny_config_has_the_published_topology(name: str, full_name: str) -> None:
    tiny, full = read_hf_config(TINY[name]), PUBLISHED_MODEL_CONFIGS[full_name]
    assert (tiny.tied, tiny.rope) == (full.tied, full.rope[: tiny.num_layers])
    sliding = [window is not None for window in full.windows][: tiny.num_layers]
    assert [window is not None for window in tiny.windows] == sliding
    assert tiny.llama3 is not None and tiny.num_heads > tiny.num_kv_heads > 1
    assert tiny.head_dim != tiny.hidden_size // tiny.num_heads and tiny.vocab_size % 2


@quick
@given(made=model_config())
@example(made=PUBLISHED_MODEL_CONFIGS["1.2B"])
@example(made=PUBLISHED_MODEL_CONFIGS["32B"])
def test_any_config_without_a_source(hf: Any, made: Exaone4ModelConfig) -> None:
    config = write_hf_config(made, {})
    assert (config["architectures"], config["model_type"]) == (["Exaone4ForCausalLM"], "exaone4")
    plain = {key for key, _ in (PLAIN_FIELDS | TRAINING_FIELDS).values()}
    assert set(config) == plain | {
        "architectures",
        "model_type",
        "num_hidden_layers",
        "rope_theta",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "sliding_window_pattern",
        "dtype",
        "torch_dtype",
    } | ({"rope_scaling"} if made.llama3 is not None else set())
    assert read_hf_config(config) == made
    assert read_hf_config(hf(config).to_dict()) == made
