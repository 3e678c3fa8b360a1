"""All-gathers without gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist

from exaone_bridge.modules.context_parallel import restore_sequence_order

__all__ = ["all_gather", "all_gather_cat", "all_gather_sequence"]


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Gather a tensor [...] of equal shape from each rank.

    Returns:
        The tensors [...] in rank order.
    """
    if group.size() == 1:
        return [tensor]
    tensor = tensor.contiguous()
    gathered = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(gathered, tensor, group=group)
    return gathered


def all_gather_cat(tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Gather shards and concatenate them in rank order.

    Args:
        tensor: [..., n, ...], with n along `dim`.
        group: the ranks that hold the shards.
        dim: the sharded dimension.

    Returns:
        [..., n * ranks, ...].
    """
    return torch.cat(all_gather(tensor, group), dim=dim)


def all_gather_sequence(tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Gather the sequence shards of context-parallel ranks, in the order of positions.

    Args:
        tensor: [..., S / cp, ...], with S / cp along `dim`.
        group: the context-parallel group.
        dim: the sequence dimension.

    Returns:
        [..., S, ...].
    """
    if group.size() == 1:
        return tensor
    return restore_sequence_order(all_gather(tensor, group), dim)
