"""The reference side: Transformers' own eager model on one rank.

It also measures how much the model amplifies a small change, which the thresholds depend on.

Axes: N prompts, S tokens of a prompt, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.models.auto_class import auto_class
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.verification.activations.capture import Activations, transformers_hooks
from exaone_bridge.verification.activations.compare import token_sizes
from exaone_bridge.verification.activations.probe_points import LOGITS, Capture, ProbePoint
from exaone_bridge.verification.checks.generation import Generated, generate
from exaone_bridge.verification.checks.gradients import (
    Gradients,
    ReferenceGradients,
    relative_norm,
)
from exaone_bridge.verification.workflow.transformers_layerwise import load_layerwise
from exaone_bridge.verification.workflow.workload import Images, PromptBatch, Workload, batch_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "ReferenceResult",
    "capture_transformers",
    "load",
    "run_generation",
    "run_other_transformers",
    "run_transformers",
    "split_fused_experts",
]

PERTURBATION = 2.0**-16  # relative: some 250 units of rounding, and still a small change


@dataclass(slots=True)
class ReferenceResult:
    """What Transformers computes for a workload.

    Attributes:
        activations: in fp32, one for each batch.
        half_precision: in the workload's dtype; None if that is fp32.
        generated: greedy generation, if the workload has it.
        gradients: of one training step, if the workload has it.
    """

    activations: list[Activations]
    half_precision: list[Activations] | None = None
    generated: dict[str, Generated] | None = None
    gradients: ReferenceGradients | None = None


def run_transformers(
    checkpoint: HFCheckpoint, workload: Workload, progress: Progress
) -> ReferenceResult:
    """Run a workload with Transformers, in fp32 and in the workload's dtype."""
    progress.stage("Transformers' logits")
    model = _load(checkpoint, torch.float32, workload.layerwise)
    result = ReferenceResult(_capture_all(model, workload, perturb=True))
    if workload.generate:
        progress.stage("Transformers' greedy generation")
        result.generated = generate(model, checkpoint.folder, workload.plain_prompt)
    if workload.gradient_batch is not None:
        progress.stage("Transformers' gradients")
        result.gradients = transformers_gradients(model, workload.gradient_batch)
    if workload.dtype != "float32":
        progress.stage(f"Transformers' logits in {workload.dtype}")
        del model
        model = _load(checkpoint, getattr(torch, workload.dtype), workload.layerwise)
        result.half_precision = _capture_all(model, workload, perturb=False)
    return result


def run_other_transformers(
    checkpoint: HFCheckpoint, workload: Workload, progress: Progress
) -> list[Activations]:
    """Run the prompts with another Hugging Face model in fp32, to compare its activations."""
    progress.stage("Transformers' logits of the other model")
    model = load(checkpoint.folder, torch.float32)
    return _capture_all(model, workload, perturb=False)


def run_generation(folder: Path, workload: Workload) -> dict[str, Generated]:
    """Generate greedily with the model of another folder."""
    return generate(load(folder, torch.float32), folder, workload.plain_prompt)


def _load(checkpoint: HFCheckpoint, dtype: torch.dtype, layerwise: bool) -> PreTrainedModel:
    return load_layerwise(checkpoint, dtype) if layerwise else load(checkpoint.folder, dtype)


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load Transformers' eager model, to the GPU if there is one."""
    from transformers import AutoConfig

    auto = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    model = auto.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    )
    return model.eval().cuda() if torch.cuda.is_available() else model.eval()


def _token_logits(model: PreTrainedModel, tokens: torch.Tensor, images: Images) -> torch.Tensor:
    """Run tokens [N, S], and return the logits of each, [N, S, V], of a head before pooling."""
    if (head := _head(model)) is None:
        return model(tokens, use_cache=False, **images).logits
    logits: torch.Tensor = head(model.base_model(tokens, use_cache=False)[0])
    return logits


def _head(model: PreTrainedModel) -> torch.nn.Module | None:
    """Return the head of a model that has one in place of an output layer."""
    return getattr(model, "score", None) or getattr(model, "qa_outputs", None)


def _capture_all(model: PreTrainedModel, workload: Workload, perturb: bool) -> list[Activations]:
    return [
        capture_transformers(model, workload.points, batch, perturb=perturb)
        for batch in workload.batches
    ]


@torch.no_grad()
def capture_transformers(
    model: PreTrainedModel,
    points: Iterable[ProbePoint],
    batch: PromptBatch,
    *,
    perturb: bool = True,
) -> Activations:
    """Run prompts of one length, and capture the logits and the activation of every probe point.

    To measure the amplification the prompts run three times in one batch: as they are, and with the
    embeddings changed by plus and by minus the same noise. A token is stable as long as no router
    chooses other experts for any of the three.

    Args:
        perturb: False: logits and activations only.
    """
    count, length = batch.tokens.shape
    copies = 3 if perturb else 1
    found = Activations(torch.empty(0), stable=torch.ones(count, length, dtype=torch.bool))

    def keep(point: ProbePoint, value: torch.Tensor, chosen: torch.Tensor | None) -> None:
        value = value.float()
        if point.capture is Capture.PATCHES:
            keep_patches(point.hf, value.view(copies, -1, value.shape[-1]))
            return
        found.values[point.hf] = value[:count].cpu().clone()
        if not perturb:
            return
        if chosen is not None:
            clean, plus, minus = chosen.split(count)
            same = (clean == plus).all(-1) & (clean == minus).all(-1)
            found.stable &= same.cpu().cumprod(-1).bool()
        found.amplification[point.hf] = _change(value, count, found.stable)

    def keep_patches(name: str, value: torch.Tensor) -> None:
        """Keep [copies, patches, features] of the images; the videos may follow in another call."""
        clean = value[:1].cpu().clone()
        if name in found.values:
            found.values[name] = torch.cat([found.values[name], clean], 1)
        else:
            found.values[name] = clean
        if perturb:
            change = _change(value, 1, torch.ones(clean.shape[:2], dtype=torch.bool))
            found.amplification[name] = max(change, found.amplification.get(name, 0.0))

    device = model.get_input_embeddings().weight.device
    tokens = batch.tokens.repeat(copies, 1).to(device)
    images = batch_images(batch.images, copies)
    images = {name: value.to(device) for name, value in images.items()}
    with (
        _perturbed(model, _perturb_copies if perturb else None),
        transformers_hooks(model, points, length, keep),
    ):
        logits = _token_logits(model, tokens, images).float()
    found.logits = logits[:count].cpu().clone()
    if perturb:
        found.amplification[LOGITS] = _change(logits, count, found.stable)
        embeddings = next(iter(found.amplification.values()))
        found.amplification = {
            name: change / embeddings for name, change in found.amplification.items()
        }
    return found


@contextlib.contextmanager
def _perturbed(model: PreTrainedModel, hook: Any) -> Iterator[None]:
    """Add a forward hook to the token embeddings, and to a vision encoder's patch embeddings."""
    patches = [module for name, module in model.named_modules() if name.endswith("patch_embed")]
    modules = [model.get_input_embeddings(), *patches] if hook is not None else []
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noise(embeddings: torch.Tensor) -> torch.Tensor:
    """Return seeded noise as large as the embeddings, [..., H]."""
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(embeddings) * embeddings.detach().square().mean(-1, keepdim=True).sqrt()


def _perturb_copies(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    """Keep the first of three copies of a batch, and change the others in opposite directions."""
    clean = output[: len(output) // 3]
    noise = PERTURBATION * _noise(clean)
    return torch.cat((clean, clean + noise, clean - noise))


def _change(value: torch.Tensor, count: int, stable: torch.Tensor | None) -> float:
    """Return the larger relative change of both changed copies, at the worst stable token.

    Args:
        value: [3 * count, S, features].
        stable: [count, S].
    """
    clean, plus, minus = value.split(count)
    size = token_sizes(clean)
    changes = [(changed - clean).abs().amax(-1) / size for changed in (plus, minus)]
    worst = torch.maximum(*changes).cpu()[stable]
    return worst.max().item() if worst.numel() else float("nan")


def transformers_gradients(model: PreTrainedModel, batch: PromptBatch) -> ReferenceGradients:
    """Compute the gradients of the mean cross entropy, and their amplification.

    Of a model with a head they are those of the mean square of its logits.

    Args:
        batch: tokens [N, S + 1].
    """

    def add_noise(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + PERTURBATION * _noise(output)

    clean = _backward(model, batch)
    with _perturbed(model, add_noise):
        perturbed = _backward(model, batch)
    change = max(relative_norm(perturbed[name], clean[name]) for name in clean)
    return ReferenceGradients(clean, change / PERTURBATION)


def _backward(model: PreTrainedModel, batch: PromptBatch) -> Gradients:
    model.zero_grad()
    tokens = batch.tokens.to(model.device)
    images = {name: each.to(model.device) for name, each in batch_images(batch.images).items()}
    logits = _token_logits(model, tokens[:, :-1], images)
    if _head(model) is None:
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    else:
        loss = logits.square().mean()
    loss.backward()
    found: Gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found |= split_fused_experts(name, parameter.grad.detach().float().cpu())
    return found


def split_fused_experts(name: str, gradient: torch.Tensor) -> Gradients:
    """Split the gradient of experts, which Transformers fuses in memory, by the names on disk.

    Args:
        name: the parameter's name in Transformers' model.
        gradient: [E, 2F, H] of gate and up, [E, H, F] of down, or of a parameter without experts.

    Returns:
        Hugging Face name -> a copy of its part.
    """
    module, _, leaf = name.rpartition(".")
    if not module.endswith(".experts"):
        return {name: gradient.clone()}
    found: Gradients = {}
    for expert, own in enumerate(gradient):
        if leaf == "gate_up_proj":
            parts = dict(zip(("gate", "up"), own.chunk(2), strict=True))
        else:
            parts = {"down": own}
        found |= {
            f"{module}.{expert}.{each}_proj.weight": part.clone() for each, part in parts.items()
        }
    return found
