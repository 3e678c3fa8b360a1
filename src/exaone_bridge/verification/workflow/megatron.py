"""Megatron-Core's side, on one rank of a world that is up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from exaone_bridge.verification.activations.capture import Activations, megatron_hooks
from exaone_bridge.verification.activations.probe_points import Capture, ProbePoint

__all__ = ["capture_megatron", "merge"]


def capture_megatron(
    model: list[Any],
    points: Sequence[ProbePoint],
    tokens: torch.Tensor,
    images: Sequence[dict[str, torch.Tensor]] = (),
) -> Activations:
    """This rank's part of a run over prompts [N, S]: logits on the last stage (else empty), its own layers' places."""
    from exaone_bridge.runtime.model import forward_logits

    count, length = tokens.shape
    seen: dict[str, list[torch.Tensor]] = {}
    with megatron_hooks(model, points, seen):
        logits, _ = forward_logits(model, tokens, images)
    vision_encoder = {point.hf for point in points if point.capture is Capture.PATCHES}
    values = {
        hf: _images_first(parts, images)
        if hf in vision_encoder
        else torch.cat(parts)[:count, :length]
        for hf, parts in seen.items()
    }
    return Activations(torch.empty(0) if logits is None else logits.cpu(), values)


def _images_first(
    parts: Sequence[torch.Tensor], images: Sequence[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """[1, patches, features] of a tower's calls: prompt by prompt its images, then its videos. Transformers has one
    call for the images of all prompts, and one for the videos."""
    kinds = ("image", "video")
    calls = [kind for each in images for kind in kinds if len(each.get(f"{kind}_grid_thw", ()))]
    made = list(zip(calls, parts, strict=True))
    return torch.cat([part for kind in kinds for call, part in made if call == kind])[None]


def merge(parts: Sequence[Activations]) -> Activations:
    """The runs of all ranks of a world, put together."""
    logits = next(part.logits for part in parts if part.logits.numel())
    return Activations(logits, {hf: value for part in parts for hf, value in part.values.items()})
