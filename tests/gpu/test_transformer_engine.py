"""Both families under Transformer Engine on one GPU: logits, round trip, and checkpoints that change backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from exaone_bridge.verification.checks.logits import prompts
from tests.helpers.packing import packing_error

NAMES = ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b", "ernie45-dense"]


def _reference(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        .cuda()
        .eval()
    )
    with torch.no_grad():
        return torch.cat(
            [model(prompt[None].cuda(), use_cache=False).logits.float().cpu() for prompt in tokens]
        )


def _ours(folder: Path, tokens: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

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
    apart = (
        _ours(folder, tokens, torch.float32, backend) - _reference(folder, tokens, torch.float32)
    ).abs()
    print(f"{name} {backend} fp32: max {apart.max():.2e}")
    assert apart.max() <= 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_bf16_logits_are_as_close_to_the_truth_as_transformers_own(
    nccl: None, tiny: Any, name: str
) -> None:
    folder = tiny(name, **wide(name), dtype="bfloat16")
    tokens = prompts(512, 4, 300)
    truth = _reference(folder, tokens, torch.float32)
    theirs = (_reference(folder, tokens, torch.bfloat16) - truth).abs()
    ours = (_ours(folder, tokens, torch.bfloat16, "transformer_engine") - truth).abs()
    print(
        f"{name} bf16: ours {ours.mean():.3e} / {ours.max():.3e}, theirs {theirs.mean():.3e} / {theirs.max():.3e}"
    )
    assert ours.mean() <= 1.1 * theirs.mean()
    assert ours.max() <= 1.1 * theirs.max()


@pytest.mark.parametrize(
    ("written", "read"), [("torch", "transformer_engine"), ("transformer_engine", "torch")]
)
@pytest.mark.parametrize("name", NAMES)
def test_megatron_checkpoint_changes_backend(
    nccl: None, tiny: Any, tmp_path: Path, name: str, written: str, read: str
) -> None:
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build, forward_logits, load_megatron

    folder = tiny(name, **wide(name))
    bridge = AutoBridge.from_hf_pretrained(folder)
    saved = build(bridge, Layout(), backend=written)
    bridge.save_megatron_model(saved, tmp_path / "megatron")
    loaded = load_megatron(bridge, tmp_path / "megatron", Layout(), backend=read)
    kinds = [
        type(unwrap_model(model[0]).decoder.layers[0].self_attention.linear_qkv).__name__
        for model in (saved, loaded)
    ]
    assert [kind.startswith("TE") for kind in kinds] == [
        side == "transformer_engine" for side in (written, read)
    ]
    bridge.save_hf_pretrained(loaded, tmp_path / "exported", show_progress=False)
    check = compare_tensors(folder, tmp_path / "exported")
    assert check.passed, check.details
    tokens = prompts(512, 1, 200)
    first, second = (forward_logits(model, tokens)[0] for model in (saved, loaded))
    assert (first - second).abs().max() <= 1e-3


def _cut(name: str, layers: int, **fields: Any) -> dict[str, Any]:
    """A published configuration with its first layers only."""
    config = CONFIGS[name] | {"num_hidden_layers": layers} | fields
    return config | (
        {"layer_types": config["layer_types"][-layers:]} if "layer_types" in config else {}
    )


# The 32B's last two layers are one with the window and one without; the 300B's experts are fewer, each of its width.
PUBLISHED = {
    "EXAONE-4.0-1.2B, 3 layers": _cut("exaone4_1p2b", 3),
    "EXAONE-4.0-32B, 2 layers": _cut("exaone4_32b", 2, sliding_window=256),
    "ERNIE-4.5-0.3B, 6 layers": _cut("ernie45_0p3b", 6),
    "ERNIE-4.5-21B-A3B, 2 layers": _cut("ernie45_21b_a3b", 2),
    "ERNIE-4.5-300B-A47B, 2 layers, 8 experts": _cut(
        "ernie45_300b_a47b", 2, moe_layer_start_index=1, moe_num_experts=8, moe_k=2
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_widths(nccl: None, tmp_path: Path, case: str) -> None:
    """Kernels are chosen by width: fp32 within 1e-3, bf16 as close to the truth as Transformers' own."""
    write_random(tmp_path / "model", PUBLISHED[case])
    tokens = prompts(PUBLISHED[case]["vocab_size"], 1, 600)
    truth = _reference(tmp_path / "model", tokens, torch.float32)
    exact = (_ours(tmp_path / "model", tokens, torch.float32, "transformer_engine") - truth).abs()
    theirs = (_reference(tmp_path / "model", tokens, torch.bfloat16) - truth).abs()
    ours = (_ours(tmp_path / "model", tokens, torch.bfloat16, "transformer_engine") - truth).abs()
    print(
        f"{case}: fp32 {exact.max():.2e}; bf16 {_figures(ours)}, theirs {_figures(theirs)}, logits {_figures(truth)}"
    )
    assert exact.max() <= 1e-3
    assert ours.mean() <= 1.1 * theirs.mean()
    assert ours.max() <= 1.1 * theirs.max()


def _figures(difference: torch.Tensor) -> str:
    return f"{difference.abs().mean():.3e} / {difference.abs().max():.3e}"


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_packed_documents_equal_the_same_alone(nccl: None, tiny: Any, name: str) -> None:
    """bf16, the only type that Transformer Engine packs: within bf16's own mean distance to fp32 (2e-2)."""
    folder = tiny(name, **wide(name), dtype="bfloat16")
    options: dict[str, Any] = {"dtype": torch.bfloat16, "backend": "transformer_engine"}
    mean, worst = packing_error(folder, Layout(), [256, 64, 192], 512, **options)
    print(f"{name}: {mean:.2e} / {worst:.2e}")
    assert mean <= 2e-2
