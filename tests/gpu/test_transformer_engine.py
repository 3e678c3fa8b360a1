"""EXAONE 4.0 and ERNIE 4.5 under Transformer Engine on one GPU: logits, backends, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from tests.helpers.bf16 import Distance, assert_bf16_close, hf_outputs
from tests.helpers.gpu import (
    BACKENDS,
    LANGUAGE_MODELS,
    hf_logits,
    logits_of,
    long_prompts,
    megatron_logits,
    megatron_outputs,
    wide,
)
from tests.helpers.packing import packing_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_fp32_logits_equal_those_of_transformers(
    nccl: None, tiny: Any, name: str, backend: str
) -> None:
    folder = tiny(name, **wide(name))
    runs = long_prompts(folder, count=2)
    reference = hf_logits(folder, runs, torch.float32)
    distance = Distance.between(megatron_logits(folder, runs, torch.float32, backend), reference)
    print(f"{name} {backend} fp32: {distance}")
    assert distance.max <= 1e-3


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_bf16_logits_are_as_exact_as_those_of_transformers(
    nccl: None, tiny: Any, name: str
) -> None:
    folder = tiny(name, **wide(name, "bfloat16"))
    runs = long_prompts(folder)
    assert_bf16_close(
        f"{name} bf16",
        megatron_outputs(folder, runs, torch.bfloat16),
        hf_outputs(folder, runs, torch.bfloat16),
        hf_outputs(folder, runs, torch.float32),
    )


@pytest.mark.parametrize(("saved_by", "loaded_by"), [BACKENDS, BACKENDS[::-1]])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_megatron_checkpoint_loads_with_the_other_backend(
    nccl: None, tiny: Any, tmp_path: Path, name: str, saved_by: str, loaded_by: str
) -> None:
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    from exaone_bridge.runtime.model import build, load_megatron

    folder = tiny(name, **wide(name))
    bridge = AutoBridge.from_hf_pretrained(folder)
    saved = build(bridge, Layout(), backend=saved_by)
    bridge.save_megatron_model(saved, tmp_path / "megatron")
    loaded = load_megatron(bridge, tmp_path / "megatron", Layout(), backend=loaded_by)
    for model, backend in ((saved, saved_by), (loaded, loaded_by)):
        linear = unwrap_model(model[0]).decoder.layers[0].self_attention.linear_qkv
        assert type(linear).__name__.startswith("TE") == (backend == "transformer_engine")
    bridge.save_hf_pretrained(loaded, tmp_path / "exported", show_progress=False)
    check = compare_tensors(folder, tmp_path / "exported")
    assert check.passed, check.details
    runs = long_prompts(folder, count=1, length=200)
    first, second = logits_of(saved, runs), logits_of(loaded, runs)
    assert first is not None and second is not None
    assert (first - second).abs().max() <= 1e-3


def _first_layers(name: str, layers: int, **fields: Any) -> dict[str, Any]:
    """Return a published config with fewer layers; of a layer pattern, the last entries stay."""
    config = CONFIGS[name] | {"num_hidden_layers": layers} | fields
    pattern = {"layer_types": config["layer_types"][-layers:]} if "layer_types" in config else {}
    return config | pattern


# The last two layers of the 32B are one with sliding-window and one with full attention.
PUBLISHED = {
    "EXAONE-4.0-1.2B, 3 layers": _first_layers("exaone4_1p2b", 3),
    "EXAONE-4.0-32B, 2 layers": _first_layers("exaone4_32b", 2, sliding_window=256),
    "ERNIE-4.5-0.3B, 6 layers": _first_layers("ernie45_0p3b", 6),
    "ERNIE-4.5-21B-A3B, 2 layers": _first_layers("ernie45_21b_a3b", 2),
    "ERNIE-4.5-300B-A47B, 2 layers, 8 experts": _first_layers(
        "ernie45_300b_a47b", 2, moe_layer_start_index=1, moe_num_experts=8, moe_k=2
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_logits_at_published_widths(nccl: None, tmp_path: Path, case: str) -> None:
    """Transformer Engine chooses its kernels by width."""
    folder = tmp_path / "model"
    write_random(folder, PUBLISHED[case])
    runs = long_prompts(folder, count=1, length=600)
    reference = hf_outputs(folder, runs, torch.float32)
    fp32 = megatron_logits(folder, runs, torch.float32)
    distance = Distance.between(fp32, reference.logits)
    print(f"{case} fp32: {distance}")
    assert distance.max <= 1e-3
    megatron = megatron_outputs(folder, runs, torch.bfloat16)
    assert_bf16_close(f"{case} bf16", megatron, hf_outputs(folder, runs, torch.bfloat16), reference)


@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_packed_documents_have_the_logits_of_single_documents(
    nccl: None, tiny: Any, name: str
) -> None:
    """Transformer Engine packs bf16 only; 2e-2 is the mean distance of bf16 to fp32."""
    folder = tiny(name, **wide(name, "bfloat16"))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "backend": "transformer_engine"}
    mean, worst = packing_error(folder, Layout(), [256, 64, 192], 512, **options)
    print(f"{name}: {mean:.2e} / {worst:.2e}")
    assert mean <= 2e-2
