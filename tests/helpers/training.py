"""Training on both sides, for tests: mean cross entropy, gradients by Hugging Face name, AdamW.

Megatron-Core's side runs its own pipeline schedule, its own data-parallel wrapper and its own `finalize_model_grads`,
because that is where gradients that several ranks share are summed (q/k norms, sequence parallelism, tied embeddings).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.modules.context_parallel import local_positions
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over all positions: logits [N, S, V], labels [N, S]."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train_transformers(
    folder: Path, tokens: torch.Tensor, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of `steps` AdamW steps, and the gradients of the first; tokens [N, S + 1]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1], use_cache=False).logits, tokens[:, 1:])
        loss.backward()
        if step == 0:
            gradients = _on_disk(
                {
                    name: value.grad
                    for name, value in model.named_parameters()
                    if value.grad is not None
                }
            )
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def _on_disk(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, by the names that a checkpoint has: Transformers fuses experts in memory only."""
    result: dict[str, torch.Tensor] = {}
    for name, gradient in gradients.items():
        module, _, leaf = name.rpartition(".")
        if not module.endswith(".experts"):
            result[name] = gradient.clone()
            continue
        for expert, own in enumerate(gradient):
            projections = (
                zip(("gate", "up"), own.chunk(2), strict=True)
                if leaf == "gate_up_proj"
                else [("down", own)]
            )
            result |= {
                f"{module}.{expert}.{which}_proj.weight": part.clone()
                for which, part in projections
            }
    return result


def _forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    from megatron.core import parallel_state

    batch = next(batches)
    group = parallel_state.get_context_parallel_group()
    mine = local_positions(group.rank(), group.size(), batch.shape[1] - 1, batch.device)
    output = model(batch[:, :-1][:, mine], mine[None], None, labels=batch[:, 1:][:, mine])

    def mean(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        share = (
            loss.mean() / group.size()
        )  # Megatron-Core sums over the ranks that share a sequence
        whole = share.detach().clone()
        torch.distributed.all_reduce(whole, group=group)
        return share, {"loss": whole}

    return output, mean


def train_megatron(
    folder: Path, layout: Layout, tokens: torch.Tensor, steps: int, **overrides: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same on this rank of a world: losses where the last stage is, gradients by Hugging Face name everywhere."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    provider.apply_overrides_and_finalize(torch.float32, layout.provider_overrides() | overrides)
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_cpu_initialization=True,
    )
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    optimizer = torch.optim.AdamW(parameters, **ADAMW)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(steps):
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        done = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(tokens.split(1)) for _ in model]
            if len(model) > 1
            else iter(tokens.split(1)),
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(tokens),
            seq_length=tokens.shape[1] - 1,
            micro_batch_size=1,
            forward_only=False,
        )
        losses.append(
            torch.stack([item["loss"] for item in done]).mean().item() if done else float("nan")
        )
        for parameter in parameters:
            parameter.grad = parameter.main_grad.clone()
        if step == 0:
            gradients = _by_hf_name(bridge, model, parameters)
        optimizer.step()
        optimizer.zero_grad()  # Megatron-Core's wrapper adds what it finds in .grad to the next step's
    return losses, gradients


@torch.no_grad()
def _by_hf_name(
    bridge: Any, model: list[Any], parameters: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients, exported as if they were the weights."""
    weights = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.grad)
    exported = {
        name: weight.clone()
        for name, weight in bridge.export_hf_weights(model, cpu=True, show_progress=False)
    }
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return exported


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of what was expected; of what was found where nothing was (an unused expert)."""
    return ((found - expected).norm() / (expected.norm() if expected.any() else 1.0)).item()


_TOKENS = torch.randint(387, (4, 41), generator=torch.Generator().manual_seed(1))


@functools.cache
def _five_steps(folder: Path, micro_batches: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of Transformers; the same for every layout."""
    return ForkLauncher(1).all(train_transformers, folder, _TOKENS[:micro_batches], 5)[0]


def assert_trains_alike(folder: Path, layout: Layout, untrained: tuple[str, ...] = ()) -> None:
    """Five AdamW steps at this layout: every loss within 1e-4, every parameter's first gradient within 1e-4 (relative).

    Args:
        folder: a Hugging Face folder whose vocabulary has 387 words.
        layout: of Megatron-Core's side.
        untrained: parts of the names of tensors that are exported and have no gradient.
    """
    # A pipeline of two stages, interleaved, is full with four; where there is none, two show that gradients add up.
    micro_batches = 4 if layout.pp > 1 else 2
    losses, gradients = _five_steps(folder, micro_batches)
    results = ForkLauncher(layout.ranks).all(
        train_megatron, folder, layout, _TOKENS[:micro_batches], 5
    )
    last_stage = [result[0] for result in results if result[0][0] == result[0][0]]
    assert last_stage
    for ours in last_stage:
        assert max(abs(a - b) for a, b in zip(ours, losses, strict=True)) <= 1e-4
    assert losses[-1] < losses[0] - 0.01  # it learns: the comparison is not of standing still
    for _, found in results:
        assert {
            name for name in found if not any(part in name for part in untrained)
        } == gradients.keys()
        worst = max(gradients, key=lambda key: relative_difference(found[key], gradients[key]))
        assert relative_difference(found[worst], gradients[worst]) <= 1e-4, worst
