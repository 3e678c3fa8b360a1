"""Logits and hidden states of every position and layer: Transformers' eager code against Megatron-Core's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.verify.report import Check

__all__ = ["LogitDifference", "compare_logits", "prompts", "reference_logits"]

Layers = Mapping[int, torch.Tensor]


def prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """[count, length] int64: words drawn from the whole vocabulary."""
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


def model_class(folder: Path) -> Any:
    """Transformers' automatic class for a folder: of models with images, or of language models."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    has_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    return AutoModelForImageTextToText if has_images else AutoModelForCausalLM


@torch.no_grad()
def reference_logits(
    folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits [N, S, V] and each decoder layer's output [N, S, H], by 0-based layer, of Transformers' eager model.

    One prompt at a time: what a batch changes in the arithmetic is no fault of a conversion.
    """
    model = model_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    hidden: dict[int, list[torch.Tensor]] = {}

    def keep(layer: int) -> Any:
        return lambda _, __, output: hidden.setdefault(layer, []).append(
            (output[0] if isinstance(output, tuple) else output).float()
        )

    for layer, module in enumerate(getattr(model.model, "language_model", model.model).layers):
        module.register_forward_hook(keep(layer))
    logits = [model(prompt[None], use_cache=False).logits.float() for prompt in tokens]
    return torch.cat(logits), {layer: torch.cat(parts) for layer, parts in hidden.items()}


@dataclass(frozen=True, slots=True)
class LogitDifference:
    """How far two models' logits are apart, and where their hidden states part first."""

    maximum: float
    mean: float
    top1: float  # share of positions where both put the same word first
    first_layer: int | None  # 0-based; None: no layer differs

    def check(self, tolerance: float) -> Check:
        """The line of a report; NaN never holds."""
        figure = f"max |difference| {self.maximum:.1e}, mean {self.mean:.1e}, top-1 agreement {self.top1:.1%}"
        where = "" if self.first_layer is None else f"hidden states part at layer {self.first_layer}"
        return Check("logits", figure, self.maximum <= tolerance, where)


def compare_logits(
    reference: tuple[torch.Tensor, Layers], ours: tuple[torch.Tensor, Layers], tolerance: float
) -> LogitDifference:
    """Compare every position of every prompt, and every layer.

    Args:
        reference, ours: logits [N, S, V] and hidden states [N, S, H] by layer.
        tolerance: absolute, on logits; hidden states may differ by as much relative to their own maximum.
    """
    difference = (ours[0] - reference[0]).abs()
    first = None
    for layer in sorted(reference[1]):
        expected, found = reference[1][layer], ours[1][layer]
        if not (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()):
            first = layer
            break
    return LogitDifference(
        maximum=difference.max().item(),
        mean=difference.mean().item(),
        top1=(ours[0].argmax(-1) == reference[0].argmax(-1)).float().mean().item(),
        first_layer=first,
    )
