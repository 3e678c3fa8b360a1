"""Transformers' side: its own eager code, and how much its own arithmetic amplifies a rounding error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.verification.activations.capture import Activations, hf_hooks
from exaone_bridge.verification.activations.probe_points import LOGITS, Capture, ProbePoint

Images = dict[
    str, torch.Tensor
]  # a prompt's pixels and grids, by the names of the model's arguments

__all__ = ["capture_transformers", "embeddings_of", "load", "model_class", "together"]

PERTURBATION = (
    2.0**-16
)  # of the embeddings, relative: some 250 units of rounding, and still a small change


def model_class(folder: Path) -> Any:
    """Transformers' automatic class for a folder: that of models with images, or that of language models."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return AutoModelForImageTextToText if has_images else AutoModelForCausalLM


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Transformers' eager model, on the GPU where there is one."""
    model = (
        model_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    )
    return model.cuda() if torch.cuda.is_available() else model


@torch.no_grad()
def capture_transformers(
    model: Any,
    points: Iterable[ProbePoint],
    tokens: torch.Tensor,
    images: Sequence[Images] = (),
    *,
    perturbed: bool = True,
) -> Activations:
    """Logits and every place, of prompts of one length; and what becomes of a small change.

    The prompts run three times in one batch: as they are, and with embeddings changed by plus and minus the same noise.
    What changes by more than that is what the model itself amplifies; where another expert is chosen, a rounding error
    would decide.

    Args:
        model: of `load`.
        tokens: [N, S].
        images: of each prompt; empty: none has any.
        nudged: False: logits and places only.
    """
    count, length = tokens.shape
    copies = 3 if perturbed else 1
    traced = Activations(torch.empty(0), stable=torch.ones(count, length, dtype=torch.bool))

    def keep(point: ProbePoint, value: torch.Tensor, chosen: torch.Tensor | None) -> None:
        value = value.float()
        if point.capture is Capture.PATCHES:
            keep_patches(point.hf, value.view(copies, -1, value.shape[-1]))
            return
        traced.values[point.hf] = value[:count].cpu().clone()
        if not perturbed:
            return
        if chosen is not None:
            same = [
                (chosen[:count] == chosen[start : start + count]).all(-1)
                for start in (count, 2 * count)
            ]
            traced.stable &= (same[0] & same[1]).cpu().cumprod(-1).bool()
        traced.amplification[point.hf] = _change(value, count, traced.stable)

    def keep_patches(name: str, value: torch.Tensor) -> None:
        """[copies, patches, features] of a tower's call for images; another, for videos, may follow."""
        clean = value[:1].cpu().clone()
        traced.values[name] = (
            torch.cat([traced.values[name], clean], 1) if name in traced.values else clean
        )
        if perturbed:
            everywhere = torch.ones(clean.shape[:2], dtype=torch.bool)
            change = _change(value, 1, everywhere)
            traced.amplification[name] = max(change, traced.amplification.get(name, 0.0))

    embeddings = embeddings_of(model)
    handles = [each.register_forward_hook(_perturb) for each in embeddings] if perturbed else []
    try:
        with hf_hooks(model, points, length, keep):
            batch = tokens.repeat(copies, 1).to(embeddings[0].weight.device)
            pictures = {
                name: value.to(batch.device) for name, value in together(images, copies).items()
            }
            logits = model(batch, use_cache=False, **pictures).logits.float()
    finally:
        for handle in handles:
            handle.remove()
    traced.logits = logits[:count].cpu().clone()
    if perturbed:
        traced.amplification[LOGITS] = _change(logits, count, traced.stable)
        inputs = next(iter(traced.amplification.values()))  # the embeddings' own change
        traced.amplification = {
            place: change / inputs for place, change in traced.amplification.items()
        }
    return traced


def together(images: Sequence[Images], copies: int = 1) -> Images:
    """The images of all prompts, as one batch has them; `copies` times, one batch after the other."""
    names = {name for each in images for name in each}
    return {
        name: torch.cat([each[name] for each in images if name in each] * copies)
        for name in sorted(names)
    }


def embeddings_of(model: Any) -> list[torch.nn.Module]:
    """What makes vectors of words, and of a vision tower's patches: where a small change is put in."""
    patches = [module for name, module in model.named_modules() if name.endswith("patch_embed")]
    return [model.get_input_embeddings(), *patches]


def _perturb(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook, for three copies of one batch: the first as it is, the others changed in opposite directions."""
    clean = output[: len(output) // 3]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    noise *= PERTURBATION * clean.square().mean(-1, keepdim=True).sqrt()
    return torch.cat((clean, clean + noise, clean - noise))


def _change(value: torch.Tensor, count: int, decided: Any) -> float:
    """The larger of both changes, relative, at the worst decided position."""
    clean = value[:count]
    size = clean.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    changes = [
        (value[start : start + count] - clean).abs().amax(-1) / size for start in (count, 2 * count)
    ]
    worst = torch.maximum(*changes).cpu()[decided]
    return worst.max().item() if worst.numel() else float("nan")
