"""`read_hf_config` against the published values, Transformers' own reader, and everything that it must refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.config import Exaone4ModelConfig, Llama3Rope, read_hf_config
from exaone_bridge.models.exaone4.tiny import TINY
from tests.helpers.exaone4_configs import (
    PUBLISHED,
    PUBLISHED_MODEL_CONFIGS,
    SPELLINGS,
    G,
    L,
    published,
    raw_configs,
    small,
)

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


# --- what is read ---


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_facts_of_the_published_models(name: str, spelling: str) -> None:
    config = published(name, spelling)
    before = copy.deepcopy(config)
    assert read_hf_config(config) == PUBLISHED_MODEL_CONFIGS[name]
    assert config == before  # reading changes nothing


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_field_of_a_published_model_matters(name: str) -> None:
    """Literal by literal: a changed field of the file changes its fact, and no other."""
    changes: dict[str, tuple[str, Any]] = {
        "vocab_size": ("vocab_size", 7),
        "hidden_size": ("hidden_size", 7),
        "intermediate_size": ("ffn_size", 7),
        "num_attention_heads": ("num_heads", 8),
        "num_key_value_heads": ("num_kv_heads", 4),
        "head_dim": ("head_dim", 6),
        "max_position_embeddings": ("max_positions", 7),
        "rms_norm_eps": ("norm_eps", 0.25),
        "initializer_range": ("init_std", 0.25),
        "attention_dropout": ("attention_dropout", 0.25),
        "tie_word_embeddings": ("tied", not PUBLISHED[name]["tie_word_embeddings"]),
        "dtype": ("dtype", "float16"),
    }
    for key, (fact, value) in changes.items():
        found = read_hf_config(published(name, "transformers-5") | {key: value})
        assert found == dataclasses.replace(PUBLISHED_MODEL_CONFIGS[name], **{fact: value}), key
    unread = {"num_layers", "rope_theta", "llama3", "windows", "rope"}  # tested below
    unread |= {"moe", "vision", "mtp"}  # EXAONE 4.0 has none of them
    assert {fact for fact, _ in changes.values()} | unread == set(
        Exaone4ModelConfig.__dataclass_fields__
    )


def test_rope_fields_one_by_one() -> None:
    fields = {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    }
    stock = Llama3Rope(
        factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_positions=16
    )
    for key in ("rope_parameters", "rope_scaling"):
        for field, fact in fields.items():
            found = read_hf_config(small(**{"rope_parameters": ..., key: LLAMA3 | {field: 3}}))
            assert found.llama3 == dataclasses.replace(stock, **{fact: 3})
            assert found.rope_theta == 500.0


def test_a_spelling_whose_theta_stands_outside_the_rope_object() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    for key in ("rope_parameters", "rope_scaling"):
        outside = small(**{"rope_parameters": ..., key: scaling}, rope_theta=3000)
        assert read_hf_config(outside).rope_theta == 3000.0
        inside = small(
            **{"rope_parameters": ..., key: scaling | {"rope_theta": 5000}}, rope_theta=3000
        )
        assert read_hf_config(inside).rope_theta == 5000.0


def test_facts_are_frozen_and_give_the_axes() -> None:
    model_config = read_hf_config(small(head_dim=6))
    assert model_config.layers == (0, 1, 2)
    assert model_config.dims == {"V": 50, "H": 32, "F": 48, "D": 6, "Q": 24, "K": 12}
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config.tied = True  # type: ignore[misc]


# --- RoPE or not: it hangs on sliding_window ---


@pytest.mark.parametrize(
    ("kinds", "window", "windows", "rope"),
    [
        (
            [G, G, G],
            4096,
            (None, None, None),
            (False, False, False),
        ),  # no layer slides, yet none has RoPE
        ([G, G, G], ..., (None, None, None), (False, False, False)),  # 4096 by default
        ([G, G, G], None, (None, None, None), (True, True, True)),
        ([L, G, L], 5, (5, None, 5), (True, False, True)),
        ([G, L, L], 1, (None, 1, 1), (False, True, True)),
        ([L, L, L], 5, (5, 5, 5), (True, True, True)),
        ([L, G, G], ..., (4096, None, None), (True, False, False)),
    ],
)
def test_rope_hangs_on_sliding_window_and_not_on_whether_a_layer_slides(
    kinds: list[str], window: Any, windows: tuple[int | None, ...], rope: tuple[bool, ...]
) -> None:
    model_config = read_hf_config(small(layer_types=kinds, sliding_window=window))
    assert (model_config.windows, model_config.rope) == (windows, rope)


# --- against Transformers ---


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_through_transformers(hf: Any, name: str, spelling: str) -> None:
    config = hf(published(name, spelling))
    for text in (config.to_json_string(), config.to_json_string(use_diff=False)):
        assert read_hf_config(json.loads(text)) == PUBLISHED_MODEL_CONFIGS[name]
    assert read_hf_config(config.to_dict()) == PUBLISHED_MODEL_CONFIGS[name]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=raw_configs())
@example(config={})
@example(config={"num_hidden_layers": 7})
@example(config={"layer_types": [G] * 32, "sliding_window": None})
def test_a_file_and_what_transformers_makes_of_it_say_the_same(
    hf: Any, config: dict[str, Any]
) -> None:
    theirs = hf(config)
    model_config = read_hf_config(config)
    assert read_hf_config(json.loads(theirs.to_json_string())) == model_config
    assert read_hf_config(theirs.to_dict()) == model_config
    # And not only the same as ourselves: the same as Transformers' own attributes.
    assert model_config.num_layers == theirs.num_hidden_layers == len(theirs.layer_types)
    assert [L if window is not None else G for window in model_config.windows] == theirs.layer_types
    assert {window for window in model_config.windows if window is not None} <= {
        theirs.sliding_window
    }
    assert model_config.rope == tuple(
        theirs.sliding_window is None or kind == L for kind in theirs.layer_types
    )
    assert model_config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (model_config.llama3 is not None) == (theirs.rope_parameters["rope_type"] == "llama3")
    if model_config.llama3 is not None:
        assert dataclasses.astuple(model_config.llama3) == tuple(
            theirs.rope_parameters[key]
            for key in (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            )
        )
    assert model_config.head_dim == getattr(
        theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads
    )
    assert model_config.dtype == str(theirs.dtype or "float32").removeprefix("torch.")
    for fact, field in {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "ffn_size": "intermediate_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "init_std": "initializer_range",
        "attention_dropout": "attention_dropout",
        "tied": "tie_word_embeddings",
    }.items():
        assert getattr(model_config, fact) == getattr(theirs, field), field


@settings(max_examples=60, deadline=None)
@given(pattern=st.integers(1, 40), layers=st.integers(1, 40))
@example(pattern=1, layers=3)
@example(pattern=4, layers=7)
@example(pattern=9, layers=4)
def test_a_whole_number_pattern_is_read_as_transformers_reads_it(
    hf: Any, pattern: int, layers: int
) -> None:
    config = small(num_hidden_layers=layers, sliding_window_pattern=pattern, layer_types=...)
    theirs = hf(config).layer_types
    assert read_hf_config(config).windows == tuple(5 if kind == L else None for kind in theirs)
    assert read_hf_config(config | {"layer_types": None}) == read_hf_config(config)
    assert read_hf_config(config) == read_hf_config(
        config | {"layer_types": theirs, "sliding_window_pattern": "LLLG"}
    )


@pytest.mark.parametrize("name", TINY)
def test_the_miniatures_are_what_transformers_writes(hf: Any, name: str) -> None:
    written = json.loads(hf(TINY[name]).to_json_string())
    del written["transformers_version"]
    assert written == TINY[name]


def test_the_miniatures_are_the_published_topologies() -> None:
    for name, full in {"exaone4": "32B", "exaone4-1.2b": "1.2B"}.items():
        tiny, model_config = read_hf_config(TINY[name]), PUBLISHED_MODEL_CONFIGS[full]
        assert tiny.tied == model_config.tied
        assert tiny.rope == model_config.rope[: tiny.num_layers]
        slides = [window is not None for window in tiny.windows]
        assert slides == [window is not None for window in model_config.windows][: tiny.num_layers]
        assert tiny.llama3 is not None and tiny.num_heads > tiny.num_kv_heads > 1
        assert tiny.head_dim != tiny.hidden_size // tiny.num_heads and tiny.vocab_size % 2


# --- what is refused ---


def refusal(config: dict[str, Any], field: str, got: object) -> str:
    """The message of the UnsupportedConfig that `read_hf_config` must raise about this field and value."""
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
def test_refused_counts(field: str, value: object) -> None:
    assert A_COUNT in refusal(small(**{field: value}), field, value)


@pytest.mark.parametrize("field", [field for field in COUNTS if field != "head_dim"])
def test_refused_null_counts(field: str) -> None:
    assert A_COUNT in refusal(small(**{field: None}), field, None)


@pytest.mark.parametrize("value", [*BAD_NUMBERS, None], ids=repr)
@pytest.mark.parametrize("field", NUMBERS)
def test_refused_numbers(field: str, value: object) -> None:
    assert A_NUMBER in refusal(small(**{field: value}), field, value)


@pytest.mark.parametrize("value", BAD_NUMBERS, ids=repr)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("field", ["rope_theta", "factor", "low_freq_factor", "high_freq_factor"])
def test_refused_rope_numbers(field: str, key: str, value: object) -> None:
    config = small(**{"rope_parameters": ..., key: LLAMA3 | {field: value}})
    assert A_NUMBER in refusal(config, field, value)


def test_refused_theta_outside_the_rope_object() -> None:
    assert A_NUMBER in refusal(small(rope_parameters=..., rope_theta=NAN), "rope_theta", NAN)


@pytest.mark.parametrize("value", [0, -8, True, 8192.0, "8192"], ids=repr)
def test_refused_original_positions(value: object) -> None:
    field = "original_max_position_embeddings"
    assert A_COUNT in refusal(small(rope_parameters=LLAMA3 | {field: value}), field, value)


@pytest.mark.parametrize("field", [key for key in LLAMA3 if key not in ("rope_type", "rope_theta")])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_refused_llama3_without_one_of_its_fields(field: str, how: str) -> None:
    rope = LLAMA3 | {field: None}
    if how == "missing":
        del rope[field]
    refusal(small(rope_parameters=rope), field, None)


@pytest.mark.parametrize("spelled", ["rope_type", "type"])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "kind", ["yarn", "linear", "dynamic", "longrope", "proportional", "LLAMA3", None, 1], ids=repr
)
def test_refused_rope_types(kind: object, key: str, spelled: str) -> None:
    rope = {name: value for name, value in LLAMA3.items() if name != "rope_type"} | {spelled: kind}
    assert "one of 'default', 'llama3'" in refusal(
        small(**{"rope_parameters": ..., key: rope}), "rope_type", kind
    )


@pytest.mark.parametrize("value", ["llama3", 1.0, [LLAMA3]], ids=repr)
def test_refused_rope_that_is_no_object(value: object) -> None:
    assert "an object" in refusal(small(rope_parameters=value), "rope_parameters", value)


@pytest.mark.parametrize("value", [0.5, 0, 2.0, "1.0"], ids=repr)
def test_refused_partial_rope(value: object) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": value}
    assert "1.0" in refusal(small(rope_parameters=rope), "partial_rotary_factor", value)


@pytest.mark.parametrize("value", ["gelu", "SiLU", "swish", None, 1], ids=repr)
def test_refused_activation(value: object) -> None:
    assert "one of 'silu'" in refusal(small(hidden_act=value), "hidden_act", value)


@pytest.mark.parametrize(
    "value", ["float64", "int8", "auto", "torch.float64", "fp32", "", 0, False, [], 16], ids=repr
)
def test_refused_dtype(value: object) -> None:
    wanted = "one of 'float32', 'bfloat16', 'float16'"
    assert wanted in refusal(small(dtype=value), "dtype", value)
    assert wanted in refusal(small(torch_dtype=value), "torch_dtype", value)
    assert wanted in refusal(small(dtype=None, torch_dtype=value), "torch_dtype", value)


def test_refused_head_counts() -> None:
    message = refusal(small(num_attention_heads=4, num_key_value_heads=3), "num_key_value_heads", 3)
    assert "a divisor of num_attention_heads=4" in message
    refusal(small(num_attention_heads=4, num_key_value_heads=8), "num_key_value_heads", 8)


def test_refused_hidden_size_that_heads_do_not_divide_unless_head_dim_is_there() -> None:
    message = refusal(small(hidden_size=34), "hidden_size", 34)
    assert "a multiple of num_attention_heads=4" in message and "or write head_dim" in message
    assert read_hf_config(small(hidden_size=34, head_dim=10)).head_dim == 10


def test_refused_odd_head_dim() -> None:
    assert "even" in refusal(small(head_dim=7), "head_dim", 7)
    assert "even" in refusal(small(hidden_size=28), "head_dim", 7)  # 28 over 4 heads


@pytest.mark.parametrize("value", [0, -3, True, False, 4.0, "x", "4096", [4096]], ids=repr)
def test_refused_window(value: object) -> None:
    for config in (small(sliding_window=value), small(sliding_window=value, layer_types=[G] * 3)):
        assert A_WINDOW in refusal(config, "sliding_window", value)


@pytest.mark.parametrize("kinds", [[L, G, L], [L, L, L], [G, G, L]])
def test_refused_sliding_layers_without_a_window(kinds: list[str]) -> None:
    message = refusal(small(sliding_window=None, layer_types=kinds), "sliding_window", None)
    assert "a number of keys" in message and "layer_types has sliding layers" in message


@pytest.mark.parametrize("pattern", [..., 4, 0, None, "LLLG"], ids=repr)
@pytest.mark.parametrize("kinds", [..., None], ids=repr)
def test_refused_no_window_without_layer_types(kinds: object, pattern: object) -> None:
    config = small(sliding_window=None, layer_types=kinds, sliding_window_pattern=pattern)
    message = refusal(config, "layer_types", None)
    assert (
        "Transformers divides by zero" in message
        and 'write "layer_types": [' in message
        and G in message
    )


def test_transformers_divides_by_zero_there(hf: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        hf(small(sliding_window=None, layer_types=...))


@pytest.mark.parametrize(
    "pattern", ["LLLG", "G", "4", 0, -1, True, False, 4.0, None, [4]], ids=repr
)
@pytest.mark.parametrize("kinds", [..., None], ids=repr)
def test_refused_patterns_without_layer_types(kinds: object, pattern: object) -> None:
    config = small(layer_types=kinds, sliding_window_pattern=pattern)
    message = refusal(config, "sliding_window_pattern", pattern)
    assert A_COUNT in message and f"write \"layer_types\": ['{L}', ..., '{G}']" in message
    # With layer_types the pattern is nobody's business.
    assert read_hf_config(config | {"layer_types": [L, G, L]}).windows == (5, None, 5)


@pytest.mark.parametrize("value", [[L, G], [L, G, L, G], []], ids=len)
def test_refused_layer_types_of_another_length(value: list[str]) -> None:
    message = refusal(small(layer_types=value), "layer_types", f"{len(value)} entries")
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
def test_refused_layer_types_of_other_words(value: object) -> None:
    assert f"a list of '{G}' and '{L}'" in refusal(small(layer_types=value), "layer_types", value)


# --- faults that these tests found, since repaired ---


def test_partial_rope_outside_the_rope_object_is_named_with_its_value() -> None:
    refusal(small(partial_rotary_factor=0.5), "partial_rotary_factor", 0.5)


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, []], ids=repr)
def test_tie_word_embeddings_that_is_no_bool_is_refused(value: object) -> None:
    refusal(small(tie_word_embeddings=value), "tie_word_embeddings", value)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    refusal(small(rms_norm_eps=10**400), "rms_norm_eps", 10**400)


def test_both_rope_objects_are_read_as_transformers_reads_them_or_refused(hf: Any) -> None:
    config = small(rope_scaling=LLAMA3)  # and rope_parameters says default
    try:
        model_config = read_hf_config(config)
    except UnsupportedConfig:
        return
    assert model_config == read_hf_config(json.loads(hf(config).to_json_string()))


def test_head_dim_null_is_refused() -> None:
    message = refusal(small(head_dim=None), "head_dim", None)
    assert "Transformers cannot run null" in message
    assert (
        "write 8, hidden_size / num_attention_heads, or take it out" in message
    )  # 32 over 4 heads


def test_low_freq_factor_zero_is_refused() -> None:
    refusal(small(rope_parameters=LLAMA3 | {"low_freq_factor": 0.0}), "low_freq_factor", 0.0)


@pytest.mark.parametrize("value", [[], 0, False, ""], ids=repr)
def test_an_empty_rope_that_is_no_object_is_refused(value: object) -> None:
    refusal(small(rope_parameters=value), "rope_parameters", value)
    refusal(small(rope_parameters=..., rope_scaling=value), "rope_scaling", value)
    refusal(small(rope_parameters=None, rope_scaling=value), "rope_scaling", value)
