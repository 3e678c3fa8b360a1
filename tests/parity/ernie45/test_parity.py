"""ERNIE 4.5 against Transformers: logits and round trips of configurations and layouts."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.models.ernie45.tiny import TINY
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.layouts import LAYOUTS, slow
from tests.helpers.parity import assert_passes

pytestmark = pytest.mark.usefixtures("cached_references")

EXPERT_LAYOUTS = [
    Layout(tp=2, ep=2),  # each expert is sharded over two ranks
    Layout(tp=2, ep=2, etp=1),  # each expert is on one rank
    Layout(pp=2, vpp=2, ep=2),
    Layout(tp=2, ep=2, sp=True),
    Layout(ep=2, cp=2),
    *slow(Layout(ep=2), Layout(ep=4), Layout(ep=2, etp=2), Layout(pp=2, ep=2)),
]

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts from the first layer on": (
        "ernie45-300b",
        {"moe_layer_start_index": 0, "moe_layer_interval": 1},
    ),
    "end before the last layer": ("ernie45", {"moe_layer_end_index": 2}),
    "end of -1": ("ernie45", {"moe_layer_end_index": -1}),
    "interval of three": ("ernie45-300b", {"moe_layer_start_index": 0, "moe_layer_interval": 3}),
    "no layer has experts": ("ernie45-300b", {"moe_layer_start_index": 9}),
    "layer types": ("ernie45", {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}),
    "one layer": (
        "ernie45",
        {"num_hidden_layers": 1, "moe_layer_start_index": 0, "moe_layer_end_index": 0},
    ),
    "one expert per token": ("ernie45", {"moe_k": 1}),
    "every expert": ("ernie45", {"moe_k": 8}),
    "weights divided by at least 0.9": ("ernie45", {"moe_norm_min": 0.9}),
    "one shared expert": ("ernie45", {"moe_num_shared_experts": 1}),
    "no shared expert, tied": ("ernie45", {"moe_num_shared_experts": 0}),
    "untied, shared experts": ("ernie45", {"tie_word_embeddings": False}),
    "biases, tied": ("ernie45", {"use_bias": True}),
    "biases, untied, no shared expert": ("ernie45-300b", {"use_bias": True}),
    "dense, biases": ("ernie45-dense", {"use_bias": True}),
    "dense, biases, untied": ("ernie45-dense", {"use_bias": True, "tie_word_embeddings": False}),
    "dense, architecture name of the published configs": (
        "ernie45-dense",
        {"architectures": ["Ernie4_5_ForCausalLM"]},
    ),
    "theta": ("ernie45", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "theta as Transformers 4 writes it": (
        "ernie45-dense",
        {"rope_parameters": None, "rope_theta": 300.0},
    ),
    "head_dim = hidden / heads": ("ernie45", {"head_dim": 16}),
    "head_dim null": ("ernie45-dense", {"head_dim": None}),
    "multi-query": ("ernie45", {"num_key_value_heads": 1}),
    "large epsilon": ("ernie45", {"rms_norm_eps": 0.1}),
    "bfloat16 on disk": ("ernie45", {"dtype": "bfloat16"}),
    "bfloat16 on disk, dense": ("ernie45-dense", {"dtype": "bfloat16"}),
    "float16 on disk": ("ernie45-300b", {"dtype": "float16"}),
}
IN_PARALLEL = [
    ("biases, tied", Layout(tp=2, pp=2)),
    ("biases, tied", Layout(tp=2, ep=2, sp=True)),
    ("biases, untied, no shared expert", Layout(tp=2)),
    ("dense, biases", Layout(tp=2)),
    ("bfloat16 on disk", Layout(tp=2, ep=2)),
    ("bfloat16 on disk", Layout(pp=2)),
    ("no layer has experts", Layout(tp=2, pp=2)),
    ("interval of three", Layout(pp=4)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_parity_at_each_layout(megatron_bridge: Any, tiny: Any, name: str, layout: Layout) -> None:
    """TP pads the vocabulary of 387."""
    assert_passes(tiny(name), layout)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["ernie45", "ernie45-300b"])
def test_parity_at_each_layout_of_experts(
    megatron_bridge: Any, tiny: Any, name: str, layout: Layout
) -> None:
    assert_passes(tiny(name), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_parity_of_each_configuration(megatron_bridge: Any, tiny: Any, case: str) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), Layout())


@pytest.mark.parametrize(("case", "layout"), IN_PARALLEL, ids=str)
def test_parity_of_configurations_in_parallel(
    megatron_bridge: Any, tiny: Any, case: str, layout: Layout
) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), layout)
