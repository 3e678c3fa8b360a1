"""A clamp of SwiGLU that a user sets on any provider: `activation_func_clamp_value`.

Megatron-Core's fused paths drop it silently; `tests/unit/modules/test_provider.py` checks that
`finalize` switches them off.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import linear, silu

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.exaone_moe import run_reference
from tests.helpers.mtp import random_tokens

LIMIT = 0.5


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT)


def _clamped_mlp(mlp: Any) -> Any:
    return lambda x: mlp.down_proj(_swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _clamped_experts(experts: Any) -> Any:
    def forward(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scales = torch.zeros(len(x), experts.num_experts).scatter(1, indices, weights.float())
        output = torch.zeros_like(x)
        for expert in range(experts.num_experts):
            gate, up = linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            output += scales[:, expert, None] * linear(_swiglu(gate, up), experts.down_proj[expert])
        return output

    return forward


def _logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Run Transformers with every MLP and all experts clamped."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.forward = _clamped_experts(module)
        elif hasattr(module, "gate_proj"):
            module.forward = _clamped_mlp(module)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def _logits_of_megatron(folder: Path, tokens: torch.Tensor, **overrides: Any) -> torch.Tensor:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), Layout(), **overrides)
    logits = forward_logits(model, tokens)
    assert logits is not None
    return logits


def _both(folder: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The user also requests the fused paths."""
    clamped = _logits_of_megatron(
        folder, tokens, activation_func_clamp_value=LIMIT, bias_activation_fusion=True
    )
    return clamped, _logits_of_megatron(folder, tokens)


@pytest.mark.parametrize("name", ["exaone4", "ernie45", "exaone-moe"])
def test_clamp_changes_the_logits_as_its_formula_does(
    megatron_bridge: Any, tiny: Any, name: str
) -> None:
    folder, tokens = tiny(name), random_tokens()[:, :-1]
    expected = ForkLauncher().first(_logits_of_transformers, folder, tokens)
    clamped, plain = ForkLauncher().first(_both, folder, tokens)
    assert (clamped - expected).abs().max() <= 1e-4
    assert (clamped - plain).abs().max() > 0.1


def test_one_limit_is_kept_where_layers_have_windows_of_their_own(
    megatron_bridge: Any, tiny: Any
) -> None:
    """Such layers have a copy of the config each (`LayerWithOwnLimits`)."""
    tokens = random_tokens()
    with_limits = tiny("exaone-moe-2", swiglu_limits=[LIMIT] * 6)
    expected = run_reference(with_limits, tokens).logits
    folder = tiny("exaone-moe-2", swiglu_limits=None)
    clamped, plain = ForkLauncher().first(_both, folder, tokens[:, :-1])
    assert (clamped - expected).abs().max() <= 1e-4
    assert (clamped - plain).abs().max() > 0.1


def _save_with_a_clamp(folder: Path, target: Path) -> None:
    """Save a clamped model in all ways."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, Layout(), activation_func_clamp_value=LIMIT)
    bridge.save_megatron_model(model, target / "megatron")
    bridge.save_hf_weights(model, target / "weights", show_progress=False)
    bridge.save_hf_pretrained(model, target / "model", show_progress=False)


@pytest.mark.parametrize("name", ["exaone4", "exaone45", "ernie45", "exaone-moe"])
def test_clamp_is_exported_only_with_a_config_that_says_it(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    """Only K-EXAONE's config.json has a field for it."""
    no_field = "config.json of this model has no field for a clamp"
    says_it = name == "exaone-moe"
    for save in (
        lambda: ForkLauncher().first(
            _save_with_a_clamp, tiny(name, num_nextn_predict_layers=0), tmp_path
        ),
        lambda: export_checkpoint(tmp_path / "megatron", tmp_path / "exported"),
    ):
        with (
            contextlib.nullcontext()
            if says_it
            else pytest.raises(UnsupportedConfig, match=no_field)
        ):
            save()
    assert (tmp_path / "weights/model.safetensors").is_file()
    for saved in (tmp_path / "model", tmp_path / "exported"):
        assert saved.exists() == says_it
        if says_it:
            assert read_json(saved / "config.json")["swiglu_limits"] == [LIMIT] * 4
