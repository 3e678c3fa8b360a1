"""EXAONE 4.0 against Transformers: logits and round trips of configurations and layouts."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.layouts import LAYOUTS, slow
from tests.helpers.parity import assert_passes

pytestmark = pytest.mark.usefixtures("cached_references")

S, F = "sliding_attention", "full_attention"
ROPE = TINY["exaone4"]["rope_parameters"]
LLAMA3_FIELDS = {
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}

MORE_LAYOUTS = [
    Layout(tp=4),  # more ranks than KV heads
    Layout(tp=2, pp=2, vpp=2, sp=True),
    *slow(Layout(pp=4), Layout(cp=4), Layout(tp=2, cp=2, sp=True), Layout(pp=2, vpp=2, cp=2)),
]

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "five layers, any pattern": (
        "exaone4",
        {"num_hidden_layers": 5, "layer_types": [F, S, S, F, S]},
    ),
    "one layer": ("exaone4", {"num_hidden_layers": 1, "layer_types": [S]}),
    "sliding-window attention only": ("exaone4", {"layer_types": [S] * 8}),
    "full attention only, no RoPE": ("exaone4", {"layer_types": [F] * 8}),
    "untied, full attention": ("exaone4-1.2b", {"tie_word_embeddings": False}),
    "tied, hybrid attention": ("exaone4", {"tie_word_embeddings": True}),
    "window of one key": ("exaone4", {"sliding_window": 1}),
    "window longer than the prompt": ("exaone4", {"sliding_window": 200}),
    "default RoPE": (
        "exaone4-1.2b",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama3 RoPE with other fields": ("exaone4-1.2b", {"rope_parameters": ROPE | LLAMA3_FIELDS}),
    "large epsilon": ("exaone4", {"rms_norm_eps": 0.1}),
    "head_dim = hidden / heads": ("exaone4", {"head_dim": 16}),
    "multi-head": ("exaone4", {"num_key_value_heads": 4}),
    "multi-query": ("exaone4", {"num_key_value_heads": 1}),
    "dropout in the config": ("exaone4", {"attention_dropout": 0.5}),
    "bfloat16 on disk": ("exaone4", {"dtype": "bfloat16"}),
    "float16 on disk": ("exaone4-1.2b", {"dtype": "float16"}),
}
OVER_TP = ["five layers, any pattern", "multi-query", "tied, hybrid attention", "bfloat16 on disk"]


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE_LAYOUTS], ids=str)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_parity_at_each_layout(megatron_bridge: Any, tiny: Any, name: str, layout: Layout) -> None:
    """TP pads the vocabulary of 387; the pipeline stages of the 1.2B share tied embeddings."""
    fields = {} if name == "exaone4" else {"num_hidden_layers": 8, "layer_types": [F] * 8}
    assert_passes(tiny(name, **fields), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_parity_of_each_configuration(megatron_bridge: Any, tiny: Any, case: str) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), Layout())


@pytest.mark.parametrize("case", OVER_TP)
def test_parity_of_configurations_over_tp(megatron_bridge: Any, tiny: Any, case: str) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), Layout(tp=2))
