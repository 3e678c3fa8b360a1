"""Vocabulary padding must not take part in the loss.

Megatron-Core 0.19.2 pads the embedding and the output layer so that all TP ranks have as many rows.
The logits of the padding are zero, not minus infinity, so they would count in the softmax: loss and
gradients would depend on the layout.

Axes: S sequence, B batch, V vocabulary with padding, tp tensor-parallel size.
"""

from __future__ import annotations

import torch

__all__ = ["mask_padded_vocabulary"]


def mask_padded_vocabulary(model: torch.nn.Module, vocab_size: int) -> None:
    """Set the padded logits of a GPTModel to the dtype's minimum.

    Logits are [S, B, V / tp], or [S, B, V] if the output layer gathers them.

    Args:
        model: a Megatron-Core GPTModel, unchanged if its output layer has no padding on this rank.
        vocab_size: tokens in the vocabulary, without padding.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None or layer.output_size <= vocab_size:
        return
    local_size = layer.output_size_per_partition
    first = layer.tp_group.rank() * local_size
    local_vocab_size = max(0, min(local_size, vocab_size - first))

    def mask(
        _module: torch.nn.Module,
        _inputs: object,
        output: tuple[torch.Tensor, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits, bias = output
        is_shard = logits.shape[-1] == local_size and layer.output_size != local_size
        size = local_vocab_size if is_shard else vocab_size
        if size == logits.shape[-1]:
            return output
        is_padding = torch.arange(logits.shape[-1], device=logits.device) >= size
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min), bias

    layer.register_forward_hook(mask)
