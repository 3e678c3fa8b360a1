"""Mixed precision training on one GPU: bf16 against Transformers, and FP8 against bf16.

Main weights and gradients are fp32; gradients of several microbatches accumulate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.gpu import train_mixed_precision, wide
from tests.helpers.training import Batches

STEPS, MICROBATCHES, LENGTH = 20, 4, 512
ADAM: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def _tokens(steps: int) -> torch.Tensor:
    """Return [steps, N, S + 1] random tokens; two batches alternate, so that the loss can fall."""
    generator = torch.Generator().manual_seed(5)
    batches = torch.randint(512, (2, MICROBATCHES, LENGTH + 1), generator=generator)
    return batches[torch.arange(steps) % 2]


def _markov_tokens(steps: int) -> torch.Tensor:
    """Return [steps, N, S + 1] new tokens at every step; each token has eight possible successors.

    The loss cannot fall below log 8; two percent of a loss near 0 are less than the noise of bf16.
    """
    generator = torch.Generator().manual_seed(6)
    followers = torch.randint(512, (512, 8), generator=generator)
    tokens = [torch.randint(512, (steps, MICROBATCHES), generator=generator)]
    for _ in range(LENGTH):
        choice = torch.randint(8, (steps, MICROBATCHES), generator=generator)
        tokens.append(followers[tokens[-1], choice])
    return torch.stack(tokens, dim=-1)


def _train_transformers(folder: Path, dtype: torch.dtype) -> list[float]:
    """Return the losses of AdamW steps on fp32 main weights, with fp32 gradients accumulated.

    Args:
        folder: the Hugging Face folder of the model.
        dtype: the data type of forward and backward pass.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    parameters = list(model.cuda().train().parameters())
    main = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(main, weight_decay=0.0, **ADAM)
    losses = []
    for batch in _tokens(STEPS).cuda():
        step_loss = 0.0
        for copy in main:
            copy.grad = torch.zeros_like(copy)
        for tokens in batch.split(1):
            logits = model(tokens[:, :-1], use_cache=False).logits.float()
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
                / MICROBATCHES
            )
            loss.backward()
            step_loss += loss.item()
            for copy, parameter in zip(main, parameters, strict=True):
                if parameter.grad is not None:
                    copy.grad += parameter.grad.float()
                    parameter.grad = None
        optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(main, parameters, strict=True):
                parameter.copy_(copy)
        losses.append(step_loss)
    return losses


def _train_megatron(
    folder: Path, tokens: torch.Tensor, precision: str = "bf16_mixed", **overrides: Any
) -> list[float]:
    """Return the loss of each step; tokens are [steps, N, S + 1]."""
    adam = {"lr": ADAM["lr"], "min_lr": ADAM["lr"], "adam_eps": ADAM["eps"], "clip_grad": 0.0}
    adam |= {"adam_beta1": ADAM["betas"][0], "adam_beta2": ADAM["betas"][1]}
    steps: list[Batches] = [[(prompt, {}) for prompt in step.split(1)] for step in tokens]
    losses, _ = train_mixed_precision(
        folder, steps, precision=precision, optimizer=adam, **overrides
    )
    return losses


@pytest.fixture(scope="module")
def transformers_curves(nccl: None, tiny: Any) -> Any:
    """Return a function: name -> Transformers' fp32 and bf16 losses, from the same weights."""
    curves: dict[str, tuple[list[float], list[float]]] = {}

    def of(name: str) -> tuple[list[float], list[float]]:
        if name not in curves:
            folder = tiny(name, **wide(name, "bfloat16"))
            curves[name] = (
                _train_transformers(folder, torch.float32),
                _train_transformers(folder, torch.bfloat16),
            )
        return curves[name]

    return of


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b"])
def test_bf16_losses_are_as_exact_as_those_of_transformers(
    transformers_curves: Any, tiny: Any, name: str, recompute: str
) -> None:
    """Their distance to Transformers' fp32 losses is at most twice that of Transformers' bf16."""
    reference, hf = (torch.tensor(curve) for curve in transformers_curves(name))
    folder = tiny(name, **wide(name, "bfloat16"))
    torch.cuda.reset_peak_memory_stats()
    megatron = torch.tensor(_train_megatron(folder, _tokens(STEPS), **RECOMPUTE[recompute]))
    peak = torch.cuda.max_memory_allocated() / 2**20
    print(f"{name}, recompute {recompute}: peak {peak:.0f} MiB")
    print("step: Transformers fp32, bf16, Megatron-Core bf16")
    for step in (0, 4, 9, 14, 19):
        print(f"  {step + 1}: {reference[step]:.5f} {hf[step]:.5f} {megatron[step]:.5f}")
    assert megatron[-1] < megatron[0] - 0.05
    bound = max(2 * (hf - reference).abs().max().item(), 2e-3)
    assert (megatron - reference).abs().max() <= bound


@pytest.mark.parametrize(
    "precision", ["bf16_with_fp8_delayed_scaling_mixed", "bf16_with_fp8_current_scaling_mixed"]
)
@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_fp8_loss_is_within_two_percent_of_bf16(
    nccl: None, tiny: Any, name: str, precision: str
) -> None:
    folder = tiny(name, **wide(name, "bfloat16"))
    bf16 = _train_megatron(folder, _markov_tokens(50))
    fp8 = _train_megatron(folder, _markov_tokens(50), precision)
    print(f"{name} {precision}: after 50 steps {fp8[-1]:.4f}, bf16 {bf16[-1]:.4f}")
    print(fp8[:3], bf16[:3])
    assert fp8 != bf16  # FP8 was used
    assert bf16[-1] < bf16[0] - 0.5
    assert abs(fp8[-1] - bf16[-1]) <= 0.02 * bf16[-1]
