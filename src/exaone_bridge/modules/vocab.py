"""A vocabulary that tensor parallelism had to pad: the padding takes no part in the loss.

Megatron-Core pads the embedding and output layer so that every rank has as many rows. The padded rows' logits are
zero, not minus infinity, and so would count in the softmax: loss and gradients would depend on the layout.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["mask_padded_vocabulary"]


def mask_padded_vocabulary(model: torch.nn.Module, vocab_size: int) -> None:
    """Make a GPTModel's logits of padded words the least number of their type; others are left as they are.

    Args:
        model: a Megatron-Core GPTModel; nothing happens where this rank's output layer holds no padding.
        vocab_size: words of the vocabulary, without padding.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return
    here = layer.output_size_per_partition
    first = layer.tp_group.rank() * here
    kept, kept_gathered = max(0, min(here, vocab_size - first)), vocab_size
    if layer.output_size <= vocab_size:
        return

    def mask(
        _: torch.nn.Module, __: Any, output: tuple[torch.Tensor, Any]
    ) -> tuple[torch.Tensor, Any]:
        logits, bias = output  # [S, B, V / tp], or [S, B, V] where the layer gathered it
        real = kept if logits.shape[-1] == here and layer.output_size != here else kept_gathered
        if real == logits.shape[-1]:
            return output
        padded = torch.arange(logits.shape[-1], device=logits.device) >= real
        return logits.masked_fill(padded, torch.finfo(logits.dtype).min), bias

    layer.register_forward_hook(mask)
