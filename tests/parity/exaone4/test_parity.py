"""EXAONE 4.0 against Transformers: every position's logits, a bitwise round trip, at every configuration and layout."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.models.exaone4.tiny import TINY
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.parity import assert_passes

pytestmark = pytest.mark.usefixtures("references")

S, F = "sliding_attention", "full_attention"
ROPE = TINY["exaone4"]["rope_parameters"]

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, sp=True),
    Layout(tp=2, pp=2, vpp=2, sp=True),
    Layout(tp=4),  # more ranks than key-value heads
    Layout(pp=4),
    Layout(cp=2),
    Layout(cp=4),
    Layout(tp=2, cp=2, sp=True),
    Layout(pp=2, vpp=2, cp=2),
]

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "five layers, any pattern": (
        "exaone4",
        {"num_hidden_layers": 5, "layer_types": [F, S, S, F, S]},
    ),
    "one layer": ("exaone4", {"num_hidden_layers": 1, "layer_types": [S]}),
    "every layer slides": ("exaone4", {"layer_types": [S] * 8}),
    "no layer slides, yet none has RoPE": ("exaone4", {"layer_types": [F] * 8}),
    "untied, global": ("exaone4-1.2b", {"tie_word_embeddings": False}),
    "tied, hybrid": ("exaone4", {"tie_word_embeddings": True}),
    "window of one key": ("exaone4", {"sliding_window": 1}),
    "window longer than the prompt": ("exaone4", {"sliding_window": 200}),
    "default RoPE": (
        "exaone4-1.2b",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama3 fields": (
        "exaone4-1.2b",
        {
            "rope_parameters": ROPE
            | {
                "low_freq_factor": 2.0,
                "high_freq_factor": 8.0,
                "original_max_position_embeddings": 16,
                "factor": 4.0,
            }
        },
    ),
    "large epsilon": ("exaone4", {"rms_norm_eps": 0.1}),
    "head_dim = hidden / heads": ("exaone4", {"head_dim": 16}),
    "multi-head": ("exaone4", {"num_key_value_heads": 4}),
    "multi-query": ("exaone4", {"num_key_value_heads": 1}),
    "dropout in the config": ("exaone4", {"attention_dropout": 0.5}),
    "bfloat16 on disk": ("exaone4", {"dtype": "bfloat16"}),
    "float16 on disk": ("exaone4-1.2b", {"dtype": "float16"}),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b"])
def test_layouts(megatron_bridge: Any, tiny: Any, name: str, layout: Layout) -> None:
    """The vocabulary, 387, is one that every tp has to pad; pipeline stages share the 1.2B's tied embeddings."""
    fields = {} if name == "exaone4" else {"num_hidden_layers": 8, "layer_types": [F] * 8}
    assert_passes(tiny(name, **fields), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(megatron_bridge: Any, tiny: Any, case: str) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), Layout())


@pytest.mark.parametrize(
    "case", ["five layers, any pattern", "multi-query", "tied, hybrid", "bfloat16 on disk"]
)
def test_configurations_under_tensor_parallelism(
    megatron_bridge: Any, tiny: Any, case: str
) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), Layout(tp=2))
