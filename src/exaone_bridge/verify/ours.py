"""Megatron-Core's side, on one rank of a world that is up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from exaone_bridge.verify.points import Point
from exaone_bridge.verify.traces import Traced, megatron_hooks

__all__ = ["merge", "run_ours"]


def run_ours(
    model: list[Any], points: Iterable[Point], tokens: torch.Tensor, images: Sequence[dict[str, torch.Tensor]] = ()
) -> Traced:
    """This rank's part of a run over prompts [N, S]: logits on the last stage (else empty), its own layers' places."""
    from exaone_bridge.host.model import forward_logits

    count, length = tokens.shape
    seen: dict[str, list[torch.Tensor]] = {}
    with megatron_hooks(model, points, seen):
        logits, _ = forward_logits(model, tokens, images)
    values = {hf: torch.cat(parts)[:count, :length] for hf, parts in seen.items()}
    return Traced(torch.empty(0) if logits is None else logits.cpu(), values)


def merge(parts: Sequence[Traced]) -> Traced:
    """The runs of all ranks of a world, put together."""
    logits = next(part.logits for part in parts if part.logits.numel())
    return Traced(logits, {hf: value for part in parts for hf, value in part.values.items()})
