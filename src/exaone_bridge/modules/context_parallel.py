"""Context parallelism: the positions of each rank, and the communication of each layer's attention.

Megatron-Core 0.19.2 divides a sequence into 2 x cp chunks and gives rank r the chunks r and
2 cp - 1 - r, so that causal attention costs every rank the same (`core/utils.py`,
`get_batch_on_this_cp_rank`). Transformer Engine then passes keys and values around a ring ("p2p"),
exchanges sequence shards for head shards ("a2a"), or gathers keys and values ("all_gather");
sliding windows work with the last two only (`pytorch/attention/dot_product_attention/
context_parallel.py`, `attn_forward_func_with_cp`).

Axes: S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exaone_bridge.errors import UnsupportedLayout

__all__ = ["choose_cp_comm_types", "local_positions", "restore_sequence_order"]

_SLIDING_WINDOW_TYPES = ("a2a", "all_gather")
_KNOWN_TYPES = ("p2p", *_SLIDING_WINDOW_TYPES, "a2a+p2p")
_REMEDY = "leave provider.cp_comm_type unset, and each layer gets one that works"


def choose_cp_comm_types(
    is_sliding: Sequence[bool],
    *,
    heads: int,
    kv_heads: int,
    cp: int,
    requested: str | Sequence[str] | None = None,
) -> list[str]:
    """Choose Megatron-Core's `cp_comm_type` for each layer.

    Sliding-window layers gather keys and values, which for grouped-query attention communicates
    less than "a2a". Full-attention layers use the ring, which never stores the keys and values of
    the full sequence.

    Args:
        is_sliding: per layer, whether it is sliding-window attention.
        heads, kv_heads: query and KV heads per rank (after tensor parallelism).
        cp: the context-parallel size.
        requested: the user's setting, for all layers or per layer; None: chosen here.

    Raises:
        UnsupportedLayout: Transformer Engine does not support a requested type for its layer.
    """
    if requested is None:
        return ["all_gather" if sliding else "p2p" for sliding in is_sliding]
    chosen = [requested] * len(is_sliding) if isinstance(requested, str) else list(requested)
    if len(chosen) != len(is_sliding):
        raise UnsupportedLayout(
            "cp_comm_type",
            got=f"{len(chosen)} entries",
            wanted=f"one for each of {len(is_sliding)} layers",
            remedy=_REMEDY,
        )
    for layer, (comm_type, sliding) in enumerate(zip(chosen, is_sliding, strict=True)):
        known = _SLIDING_WINDOW_TYPES if sliding else _KNOWN_TYPES
        if comm_type not in known:
            reason = ", because the layer has a sliding window" if sliding else ""
            raise UnsupportedLayout(
                "cp_comm_type",
                got=f"{comm_type!r} for layer {layer}",
                wanted=" or ".join(repr(name) for name in known) + reason,
                remedy=_REMEDY,
            )
        if comm_type == "a2a" and (heads % cp or kv_heads % cp):
            raise UnsupportedLayout(
                "cp_comm_type",
                got=f"'a2a' for layer {layer}",
                wanted=f"another type, because context_parallel_size={cp} does not divide a "
                f"rank's {heads} query and {kv_heads} KV heads",
                remedy="use 'all_gather' there, or another layout",
            )
    return chosen


def local_positions(
    rank: int, cp: int, length: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """List the positions of a context-parallel rank, in the order of its shard.

    Args:
        rank: the context-parallel rank.
        cp: the context-parallel size.
        length: S, the length of the full sequence.
        device: of the result.

    Returns:
        [S / cp] int64.

    Raises:
        UnsupportedLayout: `length` is not a multiple of 2 x cp.
    """
    if length % (2 * cp):
        raise UnsupportedLayout(
            "sequence length",
            got=length,
            wanted=f"a multiple of 2 x context_parallel_size = {2 * cp}",
            remedy="pad the sequence",
        )
    chunks = torch.arange(length, device=device).view(2 * cp, -1)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])


def restore_sequence_order(shards: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate the shards of all context-parallel ranks in the order of positions.

    Args:
        shards: one tensor per rank, in rank order, [..., S / cp, ...] with S / cp along `dim`.
        dim: the sequence dimension.

    Returns:
        [..., S, ...].
    """
    concatenated = torch.cat(list(shards), dim=dim)
    length, cp = concatenated.shape[dim], len(shards)
    positions = torch.cat(
        [local_positions(rank, cp, length, concatenated.device) for rank in range(cp)]
    )
    return concatenated.index_select(dim, positions.argsort())
