"""Gradients of the mean cross entropy, by Hugging Face name: Transformers' against Megatron-Core's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.precision import RoundingModel
from exaone_bridge.verification.report.report import Check
from exaone_bridge.verification.workflow.transformers import (
    PERTURBATION,
    Images,
    embeddings_of,
    together,
)

__all__ = [
    "compare_gradients",
    "export_gradients",
    "gradients_of_megatron",
    "gradients_of_transformers",
    "loss_step",
    "relative_difference",
    "split_fused_experts",
]

Gradients = dict[str, torch.Tensor]


def gradients_of_transformers(
    model: Any, tokens: torch.Tensor, images: Sequence[Images] = ()
) -> tuple[Gradients, float]:
    """Gradients by the names on disk, and how much they change, relative, for a relative change of one in the
    embeddings.

    Args:
        tokens: [N, S + 1].
        images: of each prompt; empty: none has any.
    """
    clean = _backward(model, tokens, images, 0.0)
    perturbed = _backward(model, tokens, images, PERTURBATION)
    change = max(relative_difference(perturbed[name], clean[name]) for name in clean)
    return clean, change / PERTURBATION


def _backward(
    model: Any, tokens: torch.Tensor, images: Sequence[Images], perturbation: float
) -> Gradients:
    def add_noise(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return (
            output + perturbation * noise * output.detach().square().mean(-1, keepdim=True).sqrt()
        )

    model.zero_grad()
    handles = (
        [each.register_forward_hook(add_noise) for each in embeddings_of(model)]
        if perturbation
        else []
    )
    tokens = tokens.to(model.device)
    pictures = {name: value.to(model.device) for name, value in together(images).items()}
    logits = model(tokens[:, :-1], use_cache=False, **pictures).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for handle in handles:
        handle.remove()
    found: Gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found |= split_fused_experts(name, parameter.grad.detach().float().cpu())
    return found


def split_fused_experts(name: str, gradient: torch.Tensor) -> Gradients:
    """Split a gradient of experts, which Transformers fuses in memory, by the names on disk.

    Args:
        name: the parameter's name in Transformers' model.
        gradient: [E, 2F, H] of gate and up, [E, H, F] of down, or of a parameter without experts.

    Returns:
        Hugging Face name -> copy of its part.
    """
    module, _, leaf = name.rpartition(".")
    if not module.endswith(".experts"):
        return {name: gradient.clone()}
    found: Gradients = {}
    for expert, own in enumerate(gradient):
        parts = (
            zip(("gate", "up"), own.chunk(2), strict=True)
            if leaf == "gate_up_proj"
            else [("down", own)]
        )
        found |= {f"{module}.{expert}.{which}_proj.weight": part.clone() for which, part in parts}
    return found


def loss_step(
    batches: Iterator[tuple[torch.Tensor, Images]], model: Any
) -> tuple[torch.Tensor, Any]:
    """Run a prompt [1, S + 1] through a pipeline stage, as Megatron-Core's schedules call it.

    Returns:
        The stage's output, and the function from it to the mean cross entropy of this rank's shard.
    """
    from megatron.core import parallel_state

    from exaone_bridge.modules.context_parallel import local_positions

    batch, images = next(batches)
    group = parallel_state.get_context_parallel_group()
    mine = local_positions(group.rank(), group.size(), batch.shape[1] - 1, batch.device)
    output = model(batch[:, :-1][:, mine], mine[None], None, labels=batch[:, 1:][:, mine], **images)
    # Megatron-Core sums over the ranks that share a sequence.
    return output, lambda loss: (loss.mean() / group.size(), {"loss": loss.mean().detach()})


def gradients_of_megatron(
    folder: Path, layout: Layout, backend: str, tokens: torch.Tensor, images: Sequence[Images] = ()
) -> Gradients:
    """The same on a rank, by Megatron-Core's own schedule, data-parallel wrapper and `finalize_model_grads`.

    Args:
        tokens: [N, S + 1]; N a multiple of pp, S of 2 x tp x cp.
        images: of each prompt; empty: none has any.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    fields = layout.provider_overrides() | {"backend": backend}
    provider.apply_overrides_and_finalize(torch.float32, fields)
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_cpu_initialization=not torch.cuda.is_available(),
    )
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    device = next(model[0].parameters()).device
    inputs = [{name: value.to(device) for name, value in each.items()} for each in images] or [
        {}
    ] * len(tokens)
    data = list(zip(tokens.to(device).split(1), inputs, strict=True))
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=loss_step,
        data_iterator=[iter(data) for _ in model] if len(model) > 1 else iter(data),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(tokens),
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=1,
        forward_only=False,
    )
    return export_gradients(bridge, model)


@torch.no_grad()
def export_gradients(bridge: Any, model: Any) -> Gradients:
    """Export the gradients as if they were the weights, which they overwrite; frozen ones are zero.

    Args:
        bridge: the AutoBridge of the model.
        model: this rank's chunks, in Megatron-Core's data-parallel wrapper.

    Returns:
        Hugging Face name -> fp32 gradient on the CPU, on every rank.
    """
    for chunk in model:
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
            else:
                parameter.zero_()
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    return {name: weight.clone().float() for name, weight in weights}


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`, or over 1 if that is zero."""
    size = expected.norm().item() if expected.any() else 1.0
    return (found - expected).norm().item() / size


def compare_gradients(
    reference: tuple[Gradients, float],
    ours: Mapping[str, torch.Tensor],
    model_config: Any,
    positions: int,
) -> Check:
    """Every parameter's gradient, by the norm of its difference. What has no gradient on either side is left out.

    Args:
        positions: of all prompts together: the terms of a weight's gradient.
    """
    expected, amplification = reference
    differences = {
        name: relative_difference(ours[name], expected[name]) if name in ours else float("inf")
        for name in sorted(expected)
    }
    rounding = RoundingModel(model_config, positions)
    # There and back, and the gradient itself, a sum over all positions.
    terms = 3 * rounding.terms(None, "output layer", is_last=True) + positions
    bound = rounding.threshold(terms, amplification)
    worst = max(
        differences,
        key=lambda name: differences[name] if differences[name] == differences[name] else 9e9,
    )
    faults = [
        f"{name} differs by {value:.1e}"
        for name, value in differences.items()
        if not value <= bound
    ]
    figure = f"{len(differences)} gradients, the worst of {worst}"
    values = {
        "gradients": len(differences),
        "relative": differences[worst],
        "threshold": bound,
        "worst": worst,
    }
    return Check(
        "gradients",
        figure,
        not faults,
        "; ".join(faults[:5]),
        threshold=f"{differences[worst]:.1e} of {bound:.1e} (rounding)",
        metrics=values,
    )
