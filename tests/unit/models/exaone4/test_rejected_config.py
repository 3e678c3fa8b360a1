"""Configs that EXAONE 4.0 rejects, when they are read and when they are written."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.config import read_hf_config, write_hf_config
from tests.helpers.exaone4_configs import G, L, model_config, small

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def hf() -> Any:
    """Transformers' Exaone4Config, on copies: it writes into the dictionaries that it is given."""
    from transformers.models.exaone4.configuration_exaone4 import Exaone4Config

    return lambda config: Exaone4Config(**copy.deepcopy(config))


# --- when it is read ---


def rejection(config: dict[str, Any], field: str, got: object) -> str:
    """Returns the message of the UnsupportedConfig that must name this field and value."""
    with pytest.raises(UnsupportedConfig) as caught:
        read_hf_config(config)
    message = str(caught.value)
    assert type(caught.value) is UnsupportedConfig
    assert (caught.value.field, repr(caught.value.got)) == (field, repr(got))
    assert message.startswith(f"config.json: {field} is {got!r}, and must be ")
    assert len(message.splitlines()) == 1 and message.isprintable() and message.endswith(".")
    return message


NAN, INF = float("nan"), float("inf")
A_COUNT, A_NUMBER, A_WINDOW = (
    "a positive whole number",
    "a finite number",
    "null or a positive whole number of keys",
)
COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NUMBERS = ("rms_norm_eps", "initializer_range", "attention_dropout")
BAD_NUMBERS = (NAN, INF, -INF, -1e-5, -1, True, "1e-5", [1.0])


@pytest.mark.parametrize("value", [0, -1, True, False, 4.0, "4", [4], {}], ids=repr)
@pytest.mark.parametrize("field", COUNTS)
def test_count(field: str, value: object) -> None:
    assert A_COUNT in rejection(small(**{field: value}), field, value)


@pytest.mark.parametrize("field", [field for field in COUNTS if field != "head_dim"])
def test_null_count(field: str) -> None:
    assert A_COUNT in rejection(small(**{field: None}), field, None)


@pytest.mark.parametrize("value", [*BAD_NUMBERS, None], ids=repr)
@pytest.mark.parametrize("field", NUMBERS)
def test_number(field: str, value: object) -> None:
    assert A_NUMBER in rejection(small(**{field: value}), field, value)


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("field", ["rope_theta", "factor", "low_freq_factor", "high_freq_factor"])
def test_rope_number(field: str, key: str, value: object) -> None:
    config = small(**{"rope_parameters": ..., key: LLAMA3 | {field: value}})
    assert A_NUMBER in rejection(config, field, value)


def test_theta_outside_the_rope_object() -> None:
    assert A_NUMBER in rejection(small(rope_parameters=..., rope_theta=NAN), "rope_theta", NAN)


@pytest.mark.parametrize("value", [0, -8, True, 8192.0, "8192"], ids=repr)
def test_original_positions(value: object) -> None:
    field = "original_max_position_embeddings"
    assert A_COUNT in rejection(small(rope_parameters=LLAMA3 | {field: value}), field, value)


@pytest.mark.parametrize("field", [key for key in LLAMA3 if key not in ("rope_type", "rope_theta")])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_llama3_field_missing(field: str, how: str) -> None:
    rope = LLAMA3 | {field: None}
    if how == "missing":
        del rope[field]
    rejection(small(rope_parameters=rope), field, None)


@pytest.mark.parametrize("kind_key", ["rope_type", "type"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "kind", ["yarn", "linear", "dynamic", "longrope", "proportional", "LLAMA3", None, 1], ids=repr
)
def test_rope_type(kind: object, key: str, kind_key: str) -> None:
    rope = {name: value for name, value in LLAMA3.items() if name != "rope_type"} | {kind_key: kind}
    assert "one of 'default', 'llama3'" in rejection(
        small(**{"rope_parameters": ..., key: rope}), "rope_type", kind
    )


@pytest.mark.parametrize("value", ["llama3", 1.0, [LLAMA3]], ids=repr)
def test_rope_not_an_object(value: object) -> None:
    assert "an object" in rejection(small(rope_parameters=value), "rope_parameters", value)


@pytest.mark.parametrize("value", [0.5, 0, 2.0, "1.0"], ids=repr)
def test_partial_rope(value: object) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": value}
    assert "1.0" in rejection(small(rope_parameters=rope), "partial_rotary_factor", value)


@pytest.mark.parametrize("value", ["gelu", "SiLU", "swish", None, 1], ids=repr)
def test_activation(value: object) -> None:
    assert "one of 'silu'" in rejection(small(hidden_act=value), "hidden_act", value)


@pytest.mark.parametrize(
    "value", ["float64", "int8", "auto", "torch.float64", "fp32", "", 0, False, [], 16], ids=repr
)
def test_dtype(value: object) -> None:
    wanted = "one of 'float32', 'bfloat16', 'float16'"
    assert wanted in rejection(small(dtype=value), "dtype", value)
    assert wanted in rejection(small(torch_dtype=value), "torch_dtype", value)
    assert wanted in rejection(small(dtype=None, torch_dtype=value), "torch_dtype", value)


def test_head_counts() -> None:
    message = rejection(
        small(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads", 3
    )
    assert "a divisor of num_attention_heads=4" in message
    rejection(small(num_attention_heads=4, num_key_value_heads=8), "num_key_value_heads", 8)


def test_hidden_size_not_divided_by_heads() -> None:
    message = rejection(small(hidden_size=34), "hidden_size", 34)
    assert "a multiple of num_attention_heads=4" in message and "or write head_dim" in message
    assert read_hf_config(small(hidden_size=34, head_dim=10)).head_dim == 10


def test_odd_head_dim() -> None:
    assert "even" in rejection(small(head_dim=7), "head_dim", 7)
    assert "even" in rejection(small(hidden_size=28), "head_dim", 7)  # 28 over 4 heads


@pytest.mark.parametrize("value", [0, -3, True, False, 4.0, "x", "4096", [4096]], ids=repr)
def test_window(value: object) -> None:
    for config in (small(sliding_window=value), small(sliding_window=value, layer_types=[G] * 3)):
        assert A_WINDOW in rejection(config, "sliding_window", value)


@pytest.mark.parametrize("kinds", [[L, G, L], [L, L, L], [G, G, L]])
def test_sliding_layers_without_a_window(kinds: list[str]) -> None:
    message = rejection(small(sliding_window=None, layer_types=kinds), "sliding_window", None)
    assert "a number of keys" in message and "layer_types has sliding layers" in message


@pytest.mark.parametrize("pattern", [..., 4, 0, None, "LLLG"], ids=repr)
@pytest.mark.parametrize("kinds", [..., None], ids=repr)
def test_no_window_without_layer_types(kinds: object, pattern: object) -> None:
    config = small(sliding_window=None, layer_types=kinds, sliding_window_pattern=pattern)
    message = rejection(config, "layer_types", None)
    assert (
        "Transformers divides by zero" in message
        and 'write "layer_types": [' in message
        and G in message
    )


def test_transformers_divides_by_zero_without_layer_types(hf: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        hf(small(sliding_window=None, layer_types=...))


@pytest.mark.parametrize(
    "pattern", ["LLLG", "G", "4", 0, -1, True, False, 4.0, None, [4]], ids=repr
)
@pytest.mark.parametrize("kinds", [..., None], ids=repr)
def test_pattern_without_layer_types(kinds: object, pattern: object) -> None:
    config = small(layer_types=kinds, sliding_window_pattern=pattern)
    message = rejection(config, "sliding_window_pattern", pattern)
    assert A_COUNT in message and f"write \"layer_types\": ['{L}', ..., '{G}']" in message
    # With layer_types the pattern is ignored.
    assert read_hf_config(config | {"layer_types": [L, G, L]}).windows == (5, None, 5)


@pytest.mark.parametrize("value", [[L, G], [L, G, L, G], []], ids=len)
def test_layer_types_of_another_length(value: list[str]) -> None:
    message = rejection(small(layer_types=value), "layer_types", f"{len(value)} entries")
    assert "one entry for each of num_hidden_layers=3" in message


@pytest.mark.parametrize(
    "value",
    [
        [L, G, "chunked_attention"],
        [L, G, "full"],
        [L, G, None],
        [L, G, [L]],
        [1, 0, 1],
        "LGL",
        L,
        {},
        3,
        {L: 1},
    ],
    ids=repr,
)
def test_unknown_layer_types(value: object) -> None:
    assert f"a list of '{G}' and '{L}'" in rejection(small(layer_types=value), "layer_types", value)


def test_partial_rope_outside_the_rope_object() -> None:
    rejection(small(partial_rotary_factor=0.5), "partial_rotary_factor", 0.5)


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, []], ids=repr)
def test_tie_word_embeddings_not_a_boolean(value: object) -> None:
    rejection(small(tie_word_embeddings=value), "tie_word_embeddings", value)


def test_number_too_large_for_a_float() -> None:
    rejection(small(rms_norm_eps=10**400), "rms_norm_eps", 10**400)


def test_two_rope_objects_are_rejected_or_read_as_in_transformers(hf: Any) -> None:
    config = small(rope_scaling=LLAMA3)  # and rope_parameters is the default
    try:
        model_config = read_hf_config(config)
    except UnsupportedConfig:
        return
    assert model_config == read_hf_config(json.loads(hf(config).to_json_string()))


def test_null_head_dim() -> None:
    message = rejection(small(head_dim=None), "head_dim", None)
    assert "Transformers cannot run null" in message
    assert (
        "write 8, hidden_size / num_attention_heads, or take it out" in message
    )  # 32 over 4 heads


def test_low_freq_factor_zero() -> None:
    rejection(small(rope_parameters=LLAMA3 | {"low_freq_factor": 0.0}), "low_freq_factor", 0.0)


@pytest.mark.parametrize("value", [[], 0, False, ""], ids=repr)
def test_empty_rope_not_an_object(value: object) -> None:
    rejection(small(rope_parameters=value), "rope_parameters", value)
    rejection(small(rope_parameters=..., rope_scaling=value), "rope_scaling", value)
    rejection(small(rope_parameters=None, rope_scaling=value), "rope_scaling", value)


# --- when it is written ---


@pytest.mark.parametrize(
    ("windows", "rope"),
    [
        ((5, None, 5), (True, True, True)),  # RoPE on a global layer of a hybrid model
        ((5, None, 5), (False, True, False)),
        ((5, None, 5), (False, False, False)),
        ((5, 5, 5), (True, False, True)),
        ((None, None, None), (True, False, True)),
    ],
)
@pytest.mark.parametrize("source", [{}, small()], ids=["no source", "a source"])
def test_schedule(
    windows: tuple[int | None, ...], rope: tuple[bool, ...], source: dict[str, Any]
) -> None:
    changed = dataclasses.replace(read_hf_config(small()), windows=windows, rope=rope)
    with pytest.raises(UnsupportedConfig) as caught:
        write_hf_config(changed, source)
    message = str(caught.value)
    assert type(caught.value) is UnsupportedConfig and caught.value.got == rope
    assert message.startswith(
        f"provider: no_rope_freq is {rope!r}, and must be RoPE on every layer, or on exactly the "
    )
    assert "cannot express anything else" in message and len(message.splitlines()) == 1


def test_unreadable_source() -> None:
    with pytest.raises(UnsupportedConfig, match="hidden_act"):
        write_hf_config(read_hf_config(small()), small(hidden_act="gelu"))


@pytest.mark.parametrize("field", ["windows", "rope"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_per_layer_field_of_another_length(field: str, data: st.DataObject) -> None:
    """An inconsistent config is never written as one that reads as something else."""
    made = data.draw(model_config())
    broken = dataclasses.replace(made, **{field: getattr(made, field) + getattr(made, field)[:1]})
    try:
        config = write_hf_config(broken, {})
    except UnsupportedConfig:
        return
    with pytest.raises(UnsupportedConfig):
        read_hf_config(config)


@pytest.mark.parametrize("windows", [(4, 8, None), (8, 4, None), (4, 8, 8)])
def test_two_window_sizes(windows: tuple[int | None, ...]) -> None:
    rope = tuple(window is not None for window in windows)
    changed = dataclasses.replace(read_hf_config(small()), windows=windows, rope=rope)
    with pytest.raises(UnsupportedConfig):
        write_hf_config(changed, {})
