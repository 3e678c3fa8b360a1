"""What `finalize` switches off: paths that drop a clamp of SwiGLU, and what needs a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

FUSED = {
    "bias_activation_fusion": True,
    "moe_shared_expert_overlap": True,
    "use_transformer_engine_op_fuser": True,
}
NAMES = ["exaone4", "exaone45", "ernie45", "exaone-moe", "exaone-moe-2"]


def _finalized(tiny: Any, monkeypatch: Any, name: str, *, kernel: bool, **fields: Any) -> Any:
    """Return a provider whose backend has our SwiGLU kernel, or Megatron-Core's own code only."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    from exaone_bridge.modules import moe_provider, provider
    from exaone_bridge.modules.backend import TORCH

    backend = dataclasses.replace(
        TORCH, name="a GPU's", activation=torch.nn.Identity if kernel else None
    )
    for module in (provider, moe_provider):
        monkeypatch.setattr(module, "resolve_backend", lambda _: backend)
    monkeypatch.setattr(provider, "unsupported_fusions", lambda _: ())
    made = AutoBridge.from_hf_pretrained(tiny(name)).to_megatron_provider(load_weights=False)
    for field, value in {**FUSED, **fields}.items():
        setattr(made, field, value)
    # Megatron-Core's own checks need the packages of a GPU.
    monkeypatch.setattr(GPTModelProvider, "finalize", lambda _: None)
    made.finalize()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_fused_paths_that_drop_the_clamp_are_off(
    megatron_bridge: Any, tiny: Any, monkeypatch: Any, name: str
) -> None:
    made = _finalized(tiny, monkeypatch, name, kernel=False, activation_func_clamp_value=0.5)
    assert not any(getattr(made, field) for field in FUSED)
    assert not made.use_te_activation_func


@pytest.mark.parametrize("name", NAMES)
def test_kernel_that_clamps_replaces_the_fusion(
    megatron_bridge: Any, tiny: Any, monkeypatch: Any, name: str
) -> None:
    """The overlapped shared experts then call the kernel's module, which has the limit."""
    made = _finalized(tiny, monkeypatch, name, kernel=True, activation_func_clamp_value=0.5)
    for _ in range(2):  # Megatron-Bridge finalizes twice
        assert made.use_te_activation_func and made.moe_shared_expert_overlap
        assert not made.bias_activation_fusion and not made.use_transformer_engine_op_fuser
        made.finalize()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_fused_paths_stay_without_a_clamp(
    megatron_bridge: Any, tiny: Any, monkeypatch: Any, name: str
) -> None:
    made = _finalized(tiny, monkeypatch, name, kernel=False)
    assert all(getattr(made, field) for field in FUSED)


def test_limit_of_any_layer_switches_the_fused_paths_off(
    megatron_bridge: Any, tiny: Any, monkeypatch: Any
) -> None:
    made = _finalized(tiny, monkeypatch, "exaone-moe-2", kernel=False)
    assert any(made.swiglu_limits) and not any(getattr(made, field) for field in FUSED)


@pytest.mark.parametrize("name", NAMES)
def test_torch_backend_takes_what_rl_frameworks_set(
    megatron_bridge: Any, tiny: Any, name: str
) -> None:
    """verl and slime set variable sequence lengths, and NeMo-RL the fused permutation."""
    from megatron.bridge import AutoBridge

    made = AutoBridge.from_hf_pretrained(tiny(name)).to_megatron_provider(load_weights=False)
    made.backend, made.moe_token_dispatcher_type = "torch", "alltoall"
    made.variable_seq_lengths = made.moe_permute_fusion = True
    for _ in range(2):  # Megatron-Bridge finalizes twice
        made.finalize()
        assert made.variable_seq_lengths and not made.moe_permute_fusion
    if made.num_moe_experts:  # ranks of different sequences gather tokens with each other
        made.expert_model_parallel_size = 2
        with pytest.raises(ValueError, match="does not support variable sequence length"):
            made.finalize()
