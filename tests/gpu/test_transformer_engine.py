"""Both families under Transformer Engine on one GPU: logits, round trip, and checkpoints that change backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.parts.layout import Layout
from exaone_bridge.verify.folders import compare_tensors
from exaone_bridge.verify.logits import prompts

NAMES = ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b", "ernie45-dense"]


def _reference(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").cuda().eval()
    with torch.no_grad():
        return torch.cat([model(prompt[None].cuda(), use_cache=False).logits.float().cpu() for prompt in tokens])


def _ours(folder: Path, tokens: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    from megatron.bridge import AutoBridge

    from exaone_bridge.host.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), Layout(), dtype=dtype, backend=backend)
    logits, _ = forward_logits(model, tokens)
    assert logits is not None
    return logits


def wide(name: str) -> dict[str, Any]:
    """Widths that Transformer Engine's kernels take: head_dim 64, multiples of 16."""
    fields: dict[str, Any] = {
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    }
    if name == "exaone4":
        fields["sliding_window"] = 64
    if name in ("ernie45", "ernie45-300b"):
        fields["moe_intermediate_size"] = 128
    return fields


@pytest.mark.parametrize("backend", ["transformer_engine", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits(nccl: None, tiny: Any, name: str, backend: str) -> None:
    folder = tiny(name, **wide(name))
    tokens = prompts(512, 2, 300)
    difference = (_ours(folder, tokens, torch.float32, backend) - _reference(folder, tokens, torch.float32)).abs()
    print(f"{name} {backend} fp32: max {difference.max():.2e}")
    assert difference.max() <= 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_are_as_close_to_the_truth_as_transformers_own(nccl: None, tiny: Any, name: str) -> None:
    folder = tiny(name, **wide(name), dtype="bfloat16")
    tokens = prompts(512, 4, 300)
    truth = _reference(folder, tokens, torch.float32)
    theirs = (_reference(folder, tokens, torch.bfloat16) - truth).abs()
    ours = (_ours(folder, tokens, torch.bfloat16, "transformer_engine") - truth).abs()
    print(f"{name} bf16: ours {ours.mean():.3e} / {ours.max():.3e}, theirs {theirs.mean():.3e} / {theirs.max():.3e}")
    assert ours.mean() <= 1.1 * theirs.mean()
    assert ours.max() <= 1.1 * theirs.max()


@pytest.mark.parametrize(("written", "read"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
@pytest.mark.parametrize("name", NAMES)
def test_megatron_checkpoint_changes_backend(
    nccl: None, tiny: Any, tmp_path: Path, name: str, written: str, read: str
) -> None:
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.host.model import build, forward_logits, load_megatron

    folder = tiny(name, **wide(name))
    bridge = AutoBridge.from_hf_pretrained(folder)
    saved = build(bridge, Layout(), backend=written)
    bridge.save_megatron_model(saved, tmp_path / "megatron")
    loaded = load_megatron(bridge, tmp_path / "megatron", Layout(), backend=read)
    kinds = [
        type(unwrap_model(model[0]).decoder.layers[0].self_attention.linear_qkv).__name__ for model in (saved, loaded)
    ]
    assert [kind.startswith("TE") for kind in kinds] == [side == "transformer_engine" for side in (written, read)]
    bridge.save_hf_pretrained(loaded, tmp_path / "exported", show_progress=False)
    check = compare_tensors(folder, tmp_path / "exported")
    assert check.holds, check.where
    tokens = prompts(512, 1, 200)
    first, second = (forward_logits(model, tokens)[0] for model in (saved, loaded))
    assert (first - second).abs().max() <= 1e-3
