"""`write_hf_config`: nothing changes but what the facts changed, and what is written is read back as the same facts."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone4.config import (
    Exaone4ModelConfig,
    Llama3Rope,
    read_hf_config,
    write_hf_config,
)
from exaone_bridge.models.exaone4.tiny import TINY
from tests.helpers.exaone4_configs import (
    PUBLISHED,
    PUBLISHED_MODEL_CONFIGS,
    SPELLINGS,
    G,
    L,
    model_config,
    published,
    raw_configs,
    small,
)

# What a training run may set for itself: never written over a source's own value.
TRAINING = {"max_positions": 77, "init_std": 0.5, "attention_dropout": 0.25}
LLAMA3 = Llama3Rope(
    factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_positions=16
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def less_version(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "transformers_version"}


def written(changed: Exaone4ModelConfig, source: dict[str, Any]) -> dict[str, Any]:
    """What `write_hf_config` gives, after checking that it left its source alone."""
    before = copy.deepcopy(source)
    config = write_hf_config(changed, source)
    assert source == before
    return config


# --- unchanged facts ---


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_unchanged_facts_give_the_source_back(name: str, spelling: str) -> None:
    source = published(name, spelling)
    config = written(PUBLISHED_MODEL_CONFIGS[name], source)
    assert "transformers_version" in source and "x_note" in config
    assert list(config.items()) == list(less_version(source).items())  # key by key, and in order


@pytest.mark.parametrize("name", TINY)
def test_unchanged_facts_of_the_miniatures(name: str) -> None:
    assert written(read_hf_config(TINY[name]), dict(TINY[name])) == TINY[name]


@quick
@given(source=raw_configs())
def test_unchanged_facts_of_any_source(source: dict[str, Any]) -> None:
    config = written(read_hf_config(source), source)
    assert list(config.items()) == list(less_version(source).items())


# --- one changed fact ---

ONE_FIELD = {
    "vocab_size": ("vocab_size", 153600),
    "hidden_size": ("hidden_size", 640),
    "ffn_size": ("intermediate_size", 96),
    "num_heads": ("num_attention_heads", 80),
    "num_kv_heads": ("num_key_value_heads", 2),
    "head_dim": ("head_dim", 6),
    "norm_eps": ("rms_norm_eps", 3e-4),
    "tied": ("tie_word_embeddings", True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("fact", ONE_FIELD)
def test_a_changed_fact_changes_its_field_and_no_other(fact: str, spelling: str) -> None:
    source = published("32B", spelling)
    key, value = ONE_FIELD[fact]
    changed = dataclasses.replace(PUBLISHED_MODEL_CONFIGS["32B"], **{fact: value})
    config = written(changed, source)
    assert config == less_version(source) | {key: value}
    assert list(config) == list(less_version(source))
    assert read_hf_config(config) == changed


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_changed_dtype_is_written_in_the_new_spelling(spelling: str) -> None:
    source = published("32B", spelling)
    changed = dataclasses.replace(PUBLISHED_MODEL_CONFIGS["32B"], dtype="float16")
    config = written(changed, source)
    expected = less_version(source) | {"dtype": "float16"}
    expected.pop("torch_dtype", None)
    assert config == expected
    assert read_hf_config(config) == changed


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("change", "rope"),
    [
        (
            {"rope_theta": 5e5},
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            {"llama3": LLAMA3},
            {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 5.0,
                "original_max_position_embeddings": 16,
            },
        ),
        ({"llama3": None}, {"rope_type": "default", "rope_theta": 1e6}),
    ],
    ids=["theta", "scaling", "no scaling"],
)
def test_a_changed_rope_is_written_in_the_new_spelling(
    change: dict[str, Any], rope: dict[str, Any], spelling: str
) -> None:
    source = published("32B", spelling)
    changed = dataclasses.replace(PUBLISHED_MODEL_CONFIGS["32B"], **change)
    config = written(changed, source)
    expected = less_version(source) | {"rope_parameters": rope}
    assert config == {
        key: value for key, value in expected.items() if key not in ("rope_theta", "rope_scaling")
    }
    assert read_hf_config(config) == changed


@pytest.mark.parametrize(
    ("windows", "rope", "kinds", "window"),
    [
        ((7, None, 7), (True, False, True), [L, G, L], 7),  # another width
        ((None, 5, 5), (False, True, True), [G, L, L], 5),  # other layers
        ((5, 5, 5), (True, True, True), [L, L, L], 5),
        ((None,) * 3, (True,) * 3, [G] * 3, None),  # RoPE on every global layer: no window at all
        (
            (None,) * 3,
            (False,) * 3,
            [G] * 3,
            5,
        ),  # RoPE on none: a window that no layer uses; the source's own
        ((5, None), (True, False), [L, G], 5),  # fewer layers
        ((5, None, 5, None), (True, False) * 2, [L, G] * 2, 5),  # more
    ],
)
@pytest.mark.parametrize("kinds_in_source", [True, False])
def test_a_changed_schedule_changes_layer_types_and_window(
    windows: tuple[int | None, ...],
    rope: tuple[bool, ...],
    kinds: list[str],
    window: int | None,
    kinds_in_source: bool,
) -> None:
    source = small(**({} if kinds_in_source else {"layer_types": ..., "sliding_window_pattern": 2}))
    changed = dataclasses.replace(
        read_hf_config(source), windows=windows, rope=rope, num_layers=len(windows)
    )
    config = written(changed, source)
    wanted = {"layer_types": kinds, "sliding_window": window, "num_hidden_layers": len(windows)}
    assert config == source | wanted
    assert read_hf_config(config) == changed


def test_no_rope_anywhere_has_a_window_to_hang_on() -> None:
    """NoPE on every layer is said by a window that no layer uses: 4096 where the source has none."""
    source = small(sliding_window=None, layer_types=[G] * 3)
    changed = dataclasses.replace(read_hf_config(source), rope=(False,) * 3)
    assert written(changed, source) == source | {"sliding_window": 4096}
    assert read_hf_config(written(changed, source)) == changed


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("fact", TRAINING)
def test_what_training_sets_for_itself_stays_the_sources(fact: str, spelling: str) -> None:
    source = published("32B", spelling)
    changed = dataclasses.replace(PUBLISHED_MODEL_CONFIGS["32B"], **{fact: TRAINING[fact]})
    assert written(changed, source) == less_version(source)


def test_every_fact_is_tried_above() -> None:
    others = {"num_layers", "windows", "rope", "rope_theta", "llama3", "dtype"}
    others |= {"moe", "vision", "mtp"}  # EXAONE 4.0 has none of them
    assert ONE_FIELD.keys() | TRAINING.keys() | others == set(
        Exaone4ModelConfig.__dataclass_fields__
    )


# --- any changes ---


@quick
@given(changed=model_config(), source=raw_configs().filter(lambda config: "head_dim" in config))
def test_any_facts_written_over_any_source_are_read_back(
    changed: Exaone4ModelConfig, source: dict[str, Any]
) -> None:
    before = read_hf_config(source)
    config = written(changed, source)
    kept = {name: getattr(before, name) for name in TRAINING}
    assert read_hf_config(config) == dataclasses.replace(changed, **kept)
    foreign = (
        "architectures",
        "model_type",
        "bos_token_id",
        "x_note",
        "use_cache",
        "sliding_window_pattern",
    )
    assert {key: config.get(key) for key in foreign} == {key: source.get(key) for key in foreign}
    assert "transformers_version" not in config


@pytest.fixture(scope="module")
def hf() -> Any:
    from transformers.models.exaone4.configuration_exaone4 import Exaone4Config

    return lambda config: Exaone4Config(**copy.deepcopy(config))


@quick
@given(made=model_config())
@example(made=PUBLISHED_MODEL_CONFIGS["1.2B"])
@example(made=PUBLISHED_MODEL_CONFIGS["32B"])
def test_facts_without_a_source_make_a_complete_config(hf: Any, made: Exaone4ModelConfig) -> None:
    config = written(made, {})
    assert (config["architectures"], config["model_type"]) == (["Exaone4ForCausalLM"], "exaone4")
    assert set(config) == {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "attention_dropout",
        "tie_word_embeddings",
        "rope_parameters",
        "layer_types",
        "sliding_window",
        "dtype",
    }
    assert read_hf_config(config) == made
    assert read_hf_config(hf(config).to_dict()) == made


# --- what the configuration has no words for ---


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
def test_refused_schedules(
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


def test_a_source_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UnsupportedConfig, match="hidden_act"):
        write_hf_config(read_hf_config(small()), small(hidden_act="gelu"))


@pytest.mark.parametrize("fact", ["windows", "rope"])
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_lists_of_another_length_than_num_layers_are_never_written(
    fact: str, data: st.DataObject
) -> None:
    """Facts that contradict themselves do not become a file that reads as something else."""
    made = data.draw(model_config())
    broken = dataclasses.replace(made, **{fact: getattr(made, fact) + getattr(made, fact)[:1]})
    try:
        config = write_hf_config(broken, {})
    except UnsupportedConfig:
        return
    with pytest.raises(UnsupportedConfig):
        read_hf_config(config)


# --- faults that these tests found, since repaired ---


@pytest.mark.parametrize("windows", [(4, 8, None), (8, 4, None), (4, 8, 8)])
def test_two_window_sizes_are_refused(windows: tuple[int | None, ...]) -> None:
    rope = tuple(window is not None for window in windows)
    changed = dataclasses.replace(read_hf_config(small()), windows=windows, rope=rope)
    with pytest.raises(UnsupportedConfig):
        write_hf_config(changed, {})


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"num_heads": 8}, {"num_heads": 6, "num_kv_heads": 3}], ids=str
)
def test_head_dim_is_written_where_the_source_left_it_to_be_derived(change: dict[str, int]) -> None:
    source = small()
    changed = dataclasses.replace(read_hf_config(source), **change)
    assert changed.head_dim == 8
    assert read_hf_config(write_hf_config(changed, source)) == changed


def test_the_order_of_new_keys_does_not_hang_on_the_hash_seed() -> None:
    """The same model must give the same bytes of config.json in every process."""
    program = (
        "from dataclasses import replace\n"
        "from exaone_bridge.models.exaone4.config import read_hf_config, write_hf_config\n"
        "source = {'layer_types': ['full_attention'] * 32}\n"
        "changed = replace(read_hf_config(source), vocab_size=9, hidden_size=64, ffn_size=9, num_kv_heads=8,\n"
        "                  norm_eps=0.5, head_dim=6, tied=True, dtype='float16', rope_theta=9.0)\n"
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
