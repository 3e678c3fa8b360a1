"""EXAONE 4.0's config: each field is read from config.json and written back, and no other."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from exaone_bridge.models.exaone4.config import (
    Exaone4ModelConfig,
    Llama3Rope,
    read_hf_config,
    write_hf_config,
)
from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.schema.layer_schedule import window_pattern
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

# Fields with tests of their own, and parts that EXAONE 4.0 does not have.
OTHER_FIELDS = {"num_layers", "windows", "rope", "rope_theta", "llama3", "dtype", "head"}
ABSENT_PARTS = {"moe", "vision", "mtp"}

LLAMA3 = Llama3Rope(
    factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_positions=16
)
LLAMA3_JSON = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    **{key: getattr(LLAMA3, name) for name, key in LLAMA3_KEYS.items()},
}
names = pytest.mark.parametrize("name", PUBLISHED)
versions = pytest.mark.parametrize("version", VERSIONS)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def written(changed: Exaone4ModelConfig, source: dict[str, Any]) -> dict[str, Any]:
    """The result of `write_hf_config`, after checking that its source has not changed."""
    before = copy.deepcopy(source)
    config = write_hf_config(changed, source)
    assert source == before
    return config


# --- unchanged configs ---


@names
@versions
def test_published_config_round_trip(name: str, version: str) -> None:
    source = published(name, version)
    before = copy.deepcopy(source)
    assert read_hf_config(source) == PUBLISHED_MODEL_CONFIGS[name]
    assert source == before  # reading changes nothing
    config = written(PUBLISHED_MODEL_CONFIGS[name], source)
    assert "transformers_version" in source and "x_note" in config
    assert list(config.items()) == list(source.items())  # in the same order too


@pytest.mark.parametrize("name", TINY)
def test_tiny_config_round_trip(name: str) -> None:
    assert written(read_hf_config(TINY[name]), dict(TINY[name])) == TINY[name]


@quick
@given(source=raw_configs())
def test_any_config_round_trip(source: dict[str, Any]) -> None:
    config = written(read_hf_config(source), source)
    assert list(config.items()) == list(source.items())


# --- one changed field ---


@names
@versions
@pytest.mark.parametrize("field", [*PLAIN_FIELDS, *TRAINING_FIELDS])
def test_field_round_trip(field: str, name: str, version: str) -> None:
    """A field is read from its key and no other, and written to it and no other."""
    source, before = published(name, version), PUBLISHED_MODEL_CONFIGS[name]
    key, value = (PLAIN_FIELDS | TRAINING_FIELDS)[field]
    value = not source[key] if value is ... else value
    changed = dataclasses.replace(before, **{field: value})
    assert changed != before and read_hf_config(source | {key: value}) == changed
    config = written(changed, source)
    assert config == source | ({key: value} if field in PLAIN_FIELDS else {})
    assert list(config) == list(source)


def test_every_field_is_tested() -> None:
    tested = PLAIN_FIELDS.keys() | TRAINING_FIELDS.keys() | OTHER_FIELDS | ABSENT_PARTS
    assert tested == set(Exaone4ModelConfig.__dataclass_fields__)


@names
@versions
def test_dtype_round_trip(name: str, version: str) -> None:
    """A changed dtype is written under the source's key."""
    source = published(name, version)
    changed = dataclasses.replace(PUBLISHED_MODEL_CONFIGS[name], dtype="float16")
    key = "torch_dtype" if version == "transformers-4" else "dtype"
    assert written(changed, source) == source | {key: "float16"}
    assert read_hf_config(source | {key: "float16"}) == changed


@versions
@pytest.mark.parametrize(
    ("change", "rope"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"llama3": LLAMA3}, LLAMA3_JSON | {"rope_theta": 1e6}),
        ({"llama3": None}, None),
    ],
    ids=["theta", "scaling", "no scaling"],
)
def test_rope_round_trip(change: dict[str, Any], rope: dict[str, Any] | None, version: str) -> None:
    """A changed RoPE is written in the source's spelling."""
    source = published("32B", version)
    stock = published("32B", "transformers-5")["rope_parameters"]
    fields = {"rope_type": "default", "rope_theta": 1e6} if rope is None else stock | rope
    scaling = {key: value for key, value in fields.items() if key != "rope_theta"}
    expected = source | (
        {"rope_parameters": fields}
        if version == "transformers-5"
        else {
            "rope_theta": fields["rope_theta"],
            "rope_scaling": None if rope is None else scaling,
        }
    )
    changed = dataclasses.replace(PUBLISHED_MODEL_CONFIGS["32B"], **change)
    assert written(changed, source) == expected
    assert read_hf_config(expected) == changed


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(("name", "field"), LLAMA3_KEYS.items())
def test_llama3_field_is_read(name: str, field: str, key: str) -> None:
    found = read_hf_config(small(**{"rope_parameters": ..., key: LLAMA3_JSON | {field: 3}}))
    assert found.llama3 == dataclasses.replace(LLAMA3, **{name: 3})
    assert found.rope_theta == 500.0


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_theta_in_the_rope_object_wins(key: str) -> None:
    scaling = {name: value for name, value in LLAMA3_JSON.items() if name != "rope_theta"}
    outside = small(**{"rope_parameters": ..., key: scaling}, rope_theta=3000)
    assert read_hf_config(outside).rope_theta == 3000.0
    inside = small(**{"rope_parameters": ..., key: scaling | {"rope_theta": 5000}}, rope_theta=3000)
    assert read_hf_config(inside).rope_theta == 5000.0


# --- windows and RoPE ---

# layer_types and sliding_window of config.json -> windows and RoPE of the model config. RoPE
# depends on sliding_window, not on whether a layer uses the window.
SCHEDULES: list[tuple[list[str], int | None, tuple[int | None, ...], tuple[bool, ...]]] = [
    ([L, G, L], 5, (5, None, 5), (True, False, True)),
    ([L, G, L], 7, (7, None, 7), (True, False, True)),
    ([G, L, L], 1, (None, 1, 1), (False, True, True)),
    ([G, L, L], 5, (None, 5, 5), (False, True, True)),
    ([L, L, L], 5, (5, 5, 5), (True, True, True)),
    ([G, G, G], None, (None, None, None), (True, True, True)),
    ([G, G, G], 5, (None, None, None), (False, False, False)),  # a window that no layer uses
    ([L, G], 5, (5, None), (True, False)),
    ([L, G, L, G], 5, (5, None, 5, None), (True, False, True, False)),
]


@pytest.mark.parametrize(("kinds", "window", "windows", "rope"), SCHEDULES)
@pytest.mark.parametrize("kinds_in_source", [True, False])
def test_schedule_round_trip(
    kinds: list[str],
    window: int | None,
    windows: tuple[int | None, ...],
    rope: tuple[bool, ...],
    kinds_in_source: bool,
) -> None:
    keys = {"layer_types": kinds, "sliding_window": window, "num_hidden_layers": len(kinds)}
    found = read_hf_config(small(**keys))
    assert (found.windows, found.rope) == (windows, rope)
    source = small(**({} if kinds_in_source else {"layer_types": ..., "sliding_window_pattern": 2}))
    changed = dataclasses.replace(
        read_hf_config(source), windows=windows, rope=rope, num_layers=len(windows)
    )
    config = written(changed, source)
    if (changed.windows, changed.rope) == (
        read_hf_config(source).windows,
        read_hf_config(source).rope,
    ):
        assert config == source
    else:
        pattern = window_pattern(windows)
        assert config == source | keys | {"sliding_window_pattern": pattern}
    assert read_hf_config(config) == changed


@pytest.mark.parametrize(
    ("kinds", "windows", "rope"),
    [
        ([G, G, G], (None, None, None), (False, False, False)),
        ([L, G, G], (4096, None, None), (True, False, False)),
    ],
)
def test_window_defaults_to_4096(
    kinds: list[str], windows: tuple[int | None, ...], rope: tuple[bool, ...]
) -> None:
    for window in (..., 4096):
        found = read_hf_config(small(layer_types=kinds, sliding_window=window))
        assert (found.windows, found.rope) == (windows, rope)


def test_no_rope_anywhere_is_written_with_an_unused_window() -> None:
    """The window is 4096 where the source has none."""
    source = small(sliding_window=None, layer_types=[G] * 3)
    changed = dataclasses.replace(read_hf_config(source), rope=(False,) * 3)
    expected = source | {"sliding_window": 4096, "sliding_window_pattern": None}
    assert written(changed, source) == expected
    assert read_hf_config(written(changed, source)) == changed


def test_config_is_frozen_and_gives_axis_sizes() -> None:
    found = read_hf_config(small(head_dim=6))
    assert found.layers == (0, 1, 2)
    assert found.dims == {"V": 50, "H": 32, "F": 48, "D": 6, "Q": 24, "K": 12}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.tied = True  # type: ignore[misc]


# --- any changes ---


@quick
@given(changed=model_config(), source=raw_configs().filter(lambda config: "head_dim" in config))
def test_any_config_over_any_source(changed: Exaone4ModelConfig, source: dict[str, Any]) -> None:
    before = read_hf_config(source)
    config = written(changed, source)
    kept = {name: getattr(before, name) for name in TRAINING_FIELDS}
    assert read_hf_config(config) == dataclasses.replace(changed, **kept)
    foreign = (
        "architectures",
        "model_type",
        "bos_token_id",
        "x_note",
        "use_cache",
        "transformers_version",
    )
    assert {key: config.get(key) for key in foreign} == {key: source.get(key) for key in foreign}


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"num_heads": 8}, {"num_heads": 6, "num_kv_heads": 3}], ids=str
)
def test_head_dim_is_written_where_the_source_left_it_out(change: dict[str, int]) -> None:
    source = small()
    changed = dataclasses.replace(read_hf_config(source), **change)
    assert changed.head_dim == 8
    assert read_hf_config(write_hf_config(changed, source)) == changed


def test_order_of_new_keys_does_not_depend_on_the_hash_seed() -> None:
    """The same model must give the same bytes of config.json in every process."""
    program = (
        "from dataclasses import replace\n"
        "from exaone_bridge.models.exaone4.config import read_hf_config, write_hf_config\n"
        "source = {'layer_types': ['full_attention'] * 32}\n"
        "changed = replace(read_hf_config(source), vocab_size=9, hidden_size=64, ffn_size=9,\n"
        "                  num_kv_heads=8, norm_eps=0.5, head_dim=6, tied=True,\n"
        "                  dtype='float16', rope_theta=9.0)\n"
        "print(list(write_hf_config(changed, {})), list(write_hf_config(changed, source)))"
    )
    orders = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(1, 5)
    }
    assert len(orders) == 1
