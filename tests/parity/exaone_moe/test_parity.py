"""EXAONE MoE (K-EXAONE) against Transformers: logits and round trips, experts, training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.layer_schedule import FULL, SLIDING
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.exaone_moe import run_reference
from tests.helpers.layouts import LAYOUTS, slow
from tests.helpers.parity import assert_passes
from tests.helpers.training import assert_trains_like_transformers

pytestmark = pytest.mark.usefixtures("cached_references")

EXPERT_LAYOUTS = [
    Layout(ep=2),
    Layout(ep=4),
    Layout(tp=2, ep=2, sp=True),
    Layout(pp=2, ep=2),
    Layout(ep=2, cp=2),
    *slow(Layout(tp=2, ep=2, etp=1), Layout(pp=2, vpp=2, ep=2)),
]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "architecture name of the first release": {"architectures": ["ExaoneMoEForCausalLM"]},
    "every layer has experts": {
        "first_k_dense_replace": 0,
        "mlp_layer_types": ["sparse"] * 4,
        "is_moe_layer": None,
    },
    "dense layers by their number": {
        "first_k_dense_replace": 3,
        "mlp_layer_types": None,
        "is_moe_layer": None,
    },
    "groups of experts": {"n_group": 4, "topk_group": 2},
    "weights that are not divided by their sum": {"norm_topk_prob": False},
    "one expert per token": {"num_experts_per_tok": 1},
    "every expert": {"num_experts_per_tok": 8},
    "scale of one": {"routed_scaling_factor": 1.0},
    "two shared experts": {"num_shared_experts": 2},
    "full attention first": {
        "layer_types": [FULL, SLIDING, FULL, SLIDING],
        "sliding_windows": [0, 5, 0, 5],
    },
    "window from a pattern": {
        "layer_types": None,
        "sliding_window_pattern": 2,
        "sliding_windows": None,
    },
    "tied": {"tie_word_embeddings": True},
    "multi-query, head_dim = hidden / heads": {"num_key_value_heads": 1, "head_dim": 16},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    "large epsilon": {"rms_norm_eps": 0.1},
    "without multi-token prediction": {"num_nextn_predict_layers": 0},
    "bfloat16 on disk": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parity_at_each_layout(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    """The prompts are longer than the window, and TP pads the vocabulary of 387."""
    assert_passes(tiny("exaone-moe"), layout)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
def test_parity_at_each_layout_of_experts(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    assert_passes(tiny("exaone-moe"), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_parity_of_each_configuration(megatron_bridge: Any, tiny: Any, case: str) -> None:
    assert_passes(tiny("exaone-moe", **CONFIGURATIONS[case]), Layout())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, ep=2, sp=True),
        Layout(pp=2, vpp=2),
        *slow(Layout(cp=2), Layout(ep=2), Layout(tp=2, pp=2, sp=True)),
    ],
    ids=str,
)
def test_adamw_steps_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    assert_trains_like_transformers(tiny("exaone-moe"), layout, ("e_score_correction_bias", "mtp."))


def _experts(folder: Path, layout: Layout, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return 0-based layer -> sorted experts [N * S, K] of this rank's layers."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), layout)
    found: dict[int, list[torch.Tensor]] = {}
    for chunk in model:
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_hook(
                    lambda router, __, output: found.setdefault(router.layer_number - 1, []).append(
                        output[1].nonzero()[:, 1].view(len(output[1]), -1)
                    )
                )
    forward_logits(model, tokens)
    return {layer: torch.cat(parts)[: tokens.numel()] for layer, parts in found.items()}


@pytest.mark.parametrize("fields", [{}, {"n_group": 4, "topk_group": 2}], ids=["plain", "groups"])
def test_experts_of_each_token_equal_the_reference(
    megatron_bridge: Any, tiny: Any, fields: dict[str, Any]
) -> None:
    folder = tiny("exaone-moe", **fields)
    tokens = random_prompts(387, 2, 65)
    reference = run_reference(folder, tokens).experts
    megatron = ForkLauncher().first(_experts, folder, Layout(), tokens[:, :-1])
    assert megatron.keys() == reference.keys() == {1, 2, 3}
    assert all(torch.equal(megatron[layer], reference[layer].flatten(0, 1)) for layer in megatron)
