"""Training steps of Transformers and of Megatron-Core on the same prompts: losses and gradients.

Megatron-Core runs its own pipeline schedule, data-parallel wrapper and `finalize_model_grads`,
because these sum the gradients that several ranks share (q/k norms, sequence parallelism, tied
embeddings).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.gradients import relative_norm
from exaone_bridge.verification.workflow.megatron import export_gradients, loss_step
from exaone_bridge.verification.workflow.transformers import load, split_fused_experts

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
Images = dict[str, torch.Tensor]
Batches = list[tuple[torch.Tensor, Images]]  # of each microbatch: tokens [1, S + 1], its images


class StragglerTimer(contextlib.nullcontext):  # type: ignore[type-arg]
    """Stands for Megatron-Bridge's timer, which is a context manager and makes others."""

    def __call__(self, **_: Any) -> Any:
        return self


@dataclass
class TrainingRun:
    """The result of some AdamW steps.

    Attributes:
        losses: mean cross entropy of each step; empty on ranks without the last pipeline stage.
        gradients: Hugging Face name -> fp32 gradient of the first step, on the CPU.
        frozen: Megatron-Core's names of this rank's parameters that have no gradient.
    """

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)


def device() -> str:
    """Return where both sides run; call it on a rank, because CUDA must not start before a fork."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(batches: Batches) -> Batches:
    """Move tokens and images to the GPU, if there is one."""
    where = device()
    return [
        (tokens.to(where), {name: value.to(where) for name, value in images.items()})
        for tokens, images in batches
    ]


def train_transformers(folder: Path, batches: Batches, steps: int = 1) -> TrainingRun:
    """Train Transformers' eager fp32 model; each step accumulates the gradients of all batches."""
    model = load(folder, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    run = TrainingRun()
    for step in range(steps):
        optimizer.zero_grad()
        step_loss = 0.0
        for tokens, images in to_device(batches):
            logits = model(tokens[:, :-1], use_cache=False, **images).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            (loss / len(batches)).backward()
            step_loss += loss.item() / len(batches)
        run.losses.append(step_loss)
        if step == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    run.gradients |= split_fused_experts(name, parameter.grad.cpu())
        if step + 1 < steps:
            optimizer.step()
    return run


def mean_over_cp(loss: torch.Tensor) -> torch.Tensor:
    """Return the mean over the CP ranks, each of which has the mean of its shard."""
    from megatron.core import parallel_state

    torch.distributed.all_reduce(loss, group=parallel_state.get_context_parallel_group())
    return loss / parallel_state.get_context_parallel_world_size()


def full_sequence_step(
    batches: Iterator[tuple[torch.Tensor, Images]], model: Any
) -> tuple[torch.Tensor, Any]:
    """Run a prompt as Megatron-Bridge does for vision models: the model shards it over CP."""
    tokens, images = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
    output = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], **images)
    # Megatron-Core multiplies the loss, which is a mean already, by the number of CP ranks.
    ranks = model.config.context_parallel_size
    return output, lambda loss: (loss.mean() / ranks, {"loss": loss.mean().detach()})


def train_megatron(
    folder: Path,
    layout: Layout,
    batches: Batches,
    steps: int = 1,
    *,
    forward_step: Callable[..., tuple[torch.Tensor, Any]] = loss_step,
    dtype: torch.dtype = torch.float32,
    inspect: Callable[[list[Any]], None] = lambda model: None,
    **overrides: Any,
) -> TrainingRun:
    """Train Megatron-Core's model on this rank; PP of 1 overlaps the reduction of gradients.

    Args:
        folder: the Hugging Face folder of the model.
        layout: the parallel layout of the process group.
        batches: the microbatches of each step.
        steps: the number of AdamW steps.
        forward_step: the forward step of Megatron-Core's schedules.
        dtype: the data type of parameters and arithmetic.
        inspect: is called with the model chunks before the first step.
        overrides: fields of the provider.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    fields = layout.provider_overrides() | {"pipeline_dtype": dtype, "autocast_dtype": dtype}
    provider.apply_overrides_and_finalize(dtype, fields | overrides)
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=layout.pp == 1
        ),
        use_cpu_initialization=device() == "cpu",
    )
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    if layout.pp == 1:
        config.no_sync_func = model[0].no_sync
    inspect(model)
    named = [pair for chunk in model for pair in chunk.named_parameters()]
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    run = TrainingRun(
        frozen={name.removeprefix("module.") for name, value in named if not value.requires_grad}
    )
    data = to_device(batches)
    for step in range(steps):
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(data) for _ in model] if len(model) > 1 else iter(data),
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(data),
            seq_length=data[0][0].shape[1] - 1,
            micro_batch_size=1,
            forward_only=False,
        )
        if outputs:
            mean = torch.stack([output["loss"] for output in outputs]).mean()
            run.losses.append(mean_over_cp(mean).item())
        if step == 0:
            assert not any(
                hasattr(value, "main_grad") for _, value in named if not value.requires_grad
            )
            weights = [parameter.detach().clone() for _, parameter in named]
            run.gradients = export_gradients(bridge, model)
            with torch.no_grad():
                for (_, parameter), weight in zip(named, weights, strict=True):
                    parameter.copy_(weight)
        if step + 1 < steps:
            for parameter in trained:
                parameter.grad = parameter.main_grad.clone()
            optimizer.step()
            optimizer.zero_grad()  # Megatron-Core's wrapper adds .grad to the next gradients
    return run


_TOKENS = torch.randint(387, (4, 41), generator=torch.Generator().manual_seed(1))


@functools.cache
def _five_steps_of_transformers(folder: Path, microbatches: int) -> TrainingRun:
    return ForkLauncher().first(train_transformers, folder, _batches(microbatches), 5)


def _batches(microbatches: int) -> Batches:
    return [(tokens, {}) for tokens in _TOKENS[:microbatches].split(1)]


def assert_trains_like_transformers(
    folder: Path, layout: Layout, untrained: tuple[str, ...] = ()
) -> None:
    """Check five AdamW steps: losses within 1e-4, first gradients within 1e-4 (relative).

    Args:
        folder: a Hugging Face folder with a vocabulary of 387 tokens.
        layout: the parallel layout of Megatron-Core.
        untrained: parts of the names of tensors that are exported and have no gradient.
    """
    # Four microbatches fill an interleaved pipeline of two stages; without a pipeline, two show
    # that gradients accumulate.
    microbatches = 4 if layout.pp > 1 else 2
    reference = _five_steps_of_transformers(folder, microbatches)
    runs = ForkLauncher(layout.ranks).all(train_megatron, folder, layout, _batches(microbatches), 5)
    assert reference.losses[-1] < reference.losses[0] - 0.01  # the steps do train
    losses = [run.losses for run in runs if run.losses]
    assert losses
    for megatron in losses:
        assert max(abs(a - b) for a, b in zip(megatron, reference.losses, strict=True)) <= 1e-4
    for run in runs:
        found = {name for name in run.gradients if not any(part in name for part in untrained)}
        assert found == reference.gradients.keys()
        assert_gradients_equal(run.gradients, reference.gradients)


def assert_gradients_equal(
    gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float = 1e-4
) -> None:
    """Check that the norm of each gradient's difference is at most `tolerance` of its own norm."""
    differences = {name: relative_norm(gradients[name], value) for name, value in reference.items()}
    print(
        f"largest relative difference of {len(differences)} gradients:", max(differences.values())
    )
    assert {name: value for name, value in differences.items() if not value <= tolerance} == {}
