"""K-EXAONE 2.0 and multi-token prediction against a reference in plain torch.

Transformers 5.12.1 runs neither. Where it runs the model, the reference equals it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from tests.helpers.exaone_moe import run_reference
from tests.helpers.layouts import slow
from tests.helpers.mtp import mtp_of_megatron, random_tokens
from tests.helpers.training import assert_gradients_equal

TWO = "exaone-moe-2"


def _logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def _logits_of_megatron(
    folder: Path, layout: Layout, tokens: torch.Tensor, exported: Path | None = None
) -> torch.Tensor | None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout)
    if exported is not None:
        bridge.save_hf_pretrained(model, exported, show_progress=False)
    return forward_logits(model, tokens)[0]


@pytest.mark.parametrize("fields", [{}, {"n_group": 2, "topk_group": 1}, {"norm_topk_prob": False}])
def test_reference_equals_transformers_where_the_two_overlap(
    megatron_bridge: Any, tiny: Any, fields: dict[str, Any]
) -> None:
    folder, tokens = tiny("exaone-moe", **fields), random_tokens()
    expected = ForkLauncher().first(_logits_of_transformers, folder, tokens[:, :-1])
    assert (run_reference(folder, tokens).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, ep=2, sp=True),
        Layout(pp=2, vpp=3),
        Layout(cp=2),
        *slow(Layout(tp=2), Layout(pp=3), Layout(ep=4)),
    ],
    ids=str,
)
def test_model_with_clamps_and_two_windows_equals_the_reference(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, layout: Layout
) -> None:
    folder, tokens = tiny(TWO), random_tokens()
    reference = run_reference(folder, tokens).logits
    results = ForkLauncher(layout.ranks).all(
        _logits_of_megatron, folder, layout, tokens[:, :-1], tmp_path / "exported"
    )
    logits = [each for each in results if each is not None]
    assert logits and all((each - reference).abs().max() <= 1e-4 for each in logits)
    assert compare_tensors(folder, tmp_path / "exported").passed


@pytest.mark.parametrize(
    "fields",
    [
        {"swiglu_limits": None},
        {"swiglu_limits": [0.0, 0.5, 0.5, 0.0, 0.5, 0.5]},
        {"sliding_windows": [0, 5, 5, 5, 5, 0], "sliding_window": 5},
    ],
    ids=["no clamp", "clamp of another layer", "window of another layer"],
)
def test_clamp_and_windows_change_the_logits(tiny: Any, fields: dict[str, Any]) -> None:
    """The tiny model's activations exceed the limits, and its prompts the windows."""
    tokens = random_tokens()
    logits = run_reference(tiny(TWO), tokens).logits
    assert (run_reference(tiny(TWO, **fields), tokens).logits - logits).abs().max() > 1e-3


def test_transformers_differs_from_the_reference_of_a_clamped_model(
    megatron_bridge: Any, tiny: Any
) -> None:
    """Why the reference of such a model is not Transformers."""
    folder, tokens = tiny(TWO), random_tokens()
    of_transformers = ForkLauncher().first(_logits_of_transformers, folder, tokens[:, :-1])
    assert (run_reference(folder, tokens).logits - of_transformers).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "depth", "layout"),
    [
        ("exaone-moe", 1, Layout()),
        ("exaone-moe", 1, Layout(tp=2, sp=True)),
        ("exaone-moe", 1, Layout(pp=2, vpp=2)),
        (TWO, 2, Layout()),
        *(pytest.param(TWO, 4, layout, marks=pytest.mark.slow) for layout in [Layout(ep=2)]),
    ],
    ids=str,
)
def test_mtp_logits_losses_and_gradients_equal_the_reference(
    megatron_bridge: Any, tiny: Any, name: str, depth: int, layout: Layout
) -> None:
    """The exported tensors equal the source's, those of multi-token prediction among them."""
    folder, tokens = tiny(name), random_tokens()
    reference = run_reference(folder, tokens, depth)
    results = ForkLauncher(layout.ranks).all(mtp_of_megatron, folder, layout, tokens, depth, {})
    assert any(result.logits for result in results)
    for result in results:
        assert not result.differing
        for number, logits in enumerate(result.logits):
            expected = reference.mtp_logits[number]
            assert (logits - expected)[:, : -1 - number].abs().max() <= 1e-4
        for loss, expected_loss in zip(result.losses, reference.losses[1:], strict=False):
            assert abs(loss - expected_loss) <= 1e-4
        assert_gradients_equal(result.gradients, reference.gradients)


def test_two_layers_of_mtp_on_disk_are_not_built(megatron_bridge: Any, tiny: Any) -> None:
    fields = {
        "num_nextn_predict_layers": 2,
        "mtp_layer_types": ["full_attention"] * 2,
        "mtp_sliding_windows": [0, 0],
    }
    with pytest.raises(UnsupportedConfig, match="num_nextn_predict_layers"):
        ForkLauncher().first(
            mtp_of_megatron, tiny("exaone-moe", **fields), Layout(), random_tokens(), 1, {}
        )
