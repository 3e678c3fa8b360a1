"""What the tests of ERNIE 4.5 share: configurations, layouts, a checkpoint with another selection bias."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from exaone_bridge.schema.parallel_layout import Layout

NAMES = ("ernie45", "ernie45-300b", "ernie45-dense")
MOE_NAMES = NAMES[:2]

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, sp=True),
    Layout(cp=2),
]
EXPERT_LAYOUTS = [
    Layout(ep=2),
    Layout(ep=4),
    Layout(tp=2, ep=2),  # each expert cut by two
    Layout(tp=2, ep=2, etp=1),  # each expert whole
    Layout(ep=2, etp=2),
    Layout(pp=2, ep=2),
    Layout(pp=2, vpp=2, ep=2),
    Layout(tp=2, ep=2, sp=True),
    Layout(ep=2, cp=2),
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
    "one expert a token": ("ernie45", {"moe_k": 1}),
    "every expert": ("ernie45", {"moe_k": 8}),
    "weights divided by no less than 0.9": ("ernie45", {"moe_norm_min": 0.9}),
    "one shared expert": ("ernie45", {"moe_num_shared_experts": 1}),
    "no shared expert, tied": ("ernie45", {"moe_num_shared_experts": 0}),
    "untied, shared experts": ("ernie45", {"tie_word_embeddings": False}),
    "biases, tied": ("ernie45", {"use_bias": True}),
    "biases, untied, no shared expert": ("ernie45-300b", {"use_bias": True}),
    "dense, biases": ("ernie45-dense", {"use_bias": True}),
    "dense, biases, untied": ("ernie45-dense", {"use_bias": True, "tie_word_embeddings": False}),
    "dense, as published configurations spell it": (
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


def with_selection_bias(folder: Path, target: Path, std: float) -> Path:
    """A copy whose selection biases have this standard deviation; the miniatures' is 0.02."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.mul_(std / 0.02)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
