"""K-EXAONE with Transformer Engine on one GPU: logits, published widths, training, clamps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.hf_config import with_num_layers
from exaone_bridge.schema.layer_schedule import FULL, SLIDING
from tests.helpers.bf16 import Distance, assert_bf16_close, hf_outputs
from tests.helpers.exaone_moe import run_reference
from tests.helpers.gpu import (
    BACKENDS,
    hf_logits,
    long_prompts,
    megatron_logits,
    megatron_outputs,
    train_mixed_precision,
    wide,
)
from tests.helpers.training import Batches

# Short windows, which prompts of 300 tokens exceed.
WINDOWS: dict[str, dict[str, Any]] = {
    "exaone-moe": {"sliding_window": 64, "sliding_windows": [64, 64, 64, 0]},
    "exaone-moe-2": {"sliding_windows": [0, 128, 64, 64, 64, 0]},
}
# A dense layer with sliding-window attention, and an MoE layer with full attention. The vocabulary
# is shorter than the published one, so that the test takes less time.
PUBLISHED = with_num_layers(CONFIGS["k_exaone_236b_a23b"], 2) | {
    "layer_types": [SLIDING, FULL],
    "sliding_windows": [128, 0],
    "num_experts": 16,
    "vocab_size": 32768,
}
# As `set_published_balancing` has it, with a faster bias.
BIAS_UPDATE: dict[str, Any] = {
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-2,
}
AUX_LOSS: dict[str, Any] = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 1e-4,
}


def _folder(tiny: Any, name: str, dtype: str = "float32") -> Path:
    folder: Path = tiny(name, **wide(name, dtype), **WINDOWS[name])
    return folder


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_logits_equal_those_of_transformers(nccl: None, tiny: Any, backend: str) -> None:
    folder = _folder(tiny, "exaone-moe")
    runs = long_prompts(folder, count=2)
    reference = hf_logits(folder, runs, torch.float32)
    distance = Distance.between(megatron_logits(folder, runs, torch.float32, backend), reference)
    print(f"exaone-moe {backend} fp32: {distance}")
    assert distance.max <= 1e-3


def test_bf16_logits_are_as_exact_as_those_of_transformers(nccl: None, tiny: Any) -> None:
    folder = _folder(tiny, "exaone-moe", "bfloat16")
    runs = long_prompts(folder)
    assert_bf16_close(
        "exaone-moe bf16",
        megatron_outputs(folder, runs, torch.bfloat16),
        hf_outputs(folder, runs, torch.bfloat16),
        hf_outputs(folder, runs, torch.float32),
    )


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published widths."""
    folder = tmp_path_factory.mktemp("published") / "model"
    write_random(folder, PUBLISHED)
    return folder


def test_logits_at_published_widths(nccl: None, published: Path) -> None:
    """Transformer Engine chooses its kernels by width."""
    runs = long_prompts(published, count=1, length=600)
    reference = hf_outputs(published, runs, torch.float32)
    fp32 = megatron_logits(published, runs, torch.float32)
    distance = Distance.between(fp32, reference.logits)
    print(f"K-EXAONE-236B-A23B, 2 layers, 16 experts, fp32: {distance}")
    assert distance.max <= 1e-3
    assert_bf16_close(
        "K-EXAONE-236B-A23B, 2 layers, 16 experts, bf16",
        megatron_outputs(published, runs, torch.bfloat16),
        hf_outputs(published, runs, torch.bfloat16),
        reference,
    )


def _train(folder: Path, vocab_size: int, length: int, **overrides: Any) -> None:
    """Take three steps on one batch; the loss falls, and the selection bias moves."""
    generator = torch.Generator().manual_seed(7)
    batch: Batches = [(torch.randint(vocab_size, (1, length + 1), generator=generator), {})]
    rate = {"lr": 1e-4, "min_lr": 1e-4, "clip_grad": 1.0}
    biases: list[torch.Tensor] = []

    def keep_bias(step: int, model: Any) -> None:
        buffers = dict(model.named_buffers())
        name = next(name for name in buffers if name.endswith("expert_bias"))
        biases.append(buffers[name].detach().float().cpu().clone())

    losses, _ = train_mixed_precision(
        folder, [batch] * 3, before_update=keep_bias, optimizer=rate, **BIAS_UPDATE, **overrides
    )
    print(f"losses: {losses}")
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0] - 0.01
    assert not torch.equal(biases[0], biases[-1])


def test_training_steps_at_published_widths(nccl: None, published: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    _train(published, PUBLISHED["vocab_size"], 512, **AUX_LOSS)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def test_training_steps_of_a_clamped_model(nccl: None, tiny: Any) -> None:
    """Without the auxiliary loss: Megatron-Core's log of it has the layers of the first model."""
    _train(_folder(tiny, "exaone-moe-2", "bfloat16"), 512, 256)


def test_logits_of_a_clamped_model_equal_the_reference(nccl: None, tiny: Any) -> None:
    """Transformers ignores the clamps and the windows, so our torch backend is bf16's measure."""
    folder = _folder(tiny, "exaone-moe-2", "bfloat16")
    runs = long_prompts(folder, count=2)
    ((tokens, _),) = runs
    reference = run_reference(folder, torch.nn.functional.pad(tokens, (0, 1))).logits.flatten(0, 1)
    fp32 = Distance.between(megatron_logits(folder, runs, torch.float32), reference)
    bf16, torch_bf16 = (
        Distance.between(megatron_logits(folder, runs, torch.bfloat16, backend), reference)
        for backend in BACKENDS
    )
    print(f"exaone-moe-2: fp32 {fp32}, bf16 {bf16}, bf16 of the torch backend {torch_bf16}")
    assert fp32.max <= 1e-3
    assert bf16.mean <= 1.1 * torch_bf16.mean
    ignored = Distance.between(hf_logits(folder, runs, torch.float32), reference)
    assert ignored.mean > 3 * bf16.mean  # the clamps and windows act
