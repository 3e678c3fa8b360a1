"""Context parallelism: which positions a rank holds, and how each layer's attention reaches the others.

Megatron-Core cuts a sequence into 2 x cp chunks and gives rank r the chunks r and 2 cp - 1 - r, so that causal
attention costs every rank the same (`megatron/core/utils.py`, `get_batch_on_this_cp_rank`). Transformer Engine can
then pass keys and values around a ring ("p2p"), trade sequence for heads ("a2a"), or gather keys and values
("all_gather"); a window works with the last two only (`context_parallel.py`, `attn_forward_func_with_cp`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exaone_bridge.errors import UnsupportedLayout

__all__ = ["exchanges", "gathered_in_order", "positions_of"]

_WINDOWED = ("a2a", "all_gather")
_KNOWN = ("p2p", *_WINDOWED, "a2a+p2p")


def exchanges(
    windowed: Sequence[bool],
    *,
    heads: int,
    kv_heads: int,
    cp: int,
    asked: str | Sequence[str] | None = None,
) -> list[str]:
    """Megatron-Core's `cp_comm_type`, one entry a layer.

    Windowed layers gather keys and values, which for grouped-query heads is less to send than trading heads is;
    global ones send them round the ring, which never holds the whole sequence's.

    Args:
        windowed: per layer, whether its attention has a window.
        heads, kv_heads: query and key-value heads of one rank (after tensor parallelism).
        cp: ranks that share a sequence.
        asked: what the user set: one name for every layer, or one a layer; None: ours to choose.

    Raises:
        UnsupportedLayout: an exchange that Transformer Engine cannot do for that layer.
    """
    if asked is None:
        return ["all_gather" if window else "p2p" for window in windowed]
    chosen = [asked] * len(windowed) if isinstance(asked, str) else list(asked)
    if len(chosen) != len(windowed):
        raise UnsupportedLayout(
            "cp_comm_type",
            got=f"{len(chosen)} entries",
            wanted=f"one for each of {len(windowed)} layers",
            remedy="leave provider.cp_comm_type out, and each layer gets what it can do",
        )
    for layer, (exchange, window) in enumerate(zip(chosen, windowed, strict=True)):
        if exchange not in _KNOWN or (window and exchange not in _WINDOWED):
            raise UnsupportedLayout(
                "cp_comm_type",
                got=f"{exchange!r} for layer {layer}",
                wanted=" or ".join(repr(name) for name in (_WINDOWED if window else _KNOWN))
                + (", because the layer has a window" if window else ""),
                remedy="leave provider.cp_comm_type out, and each layer gets what it can do",
            )
        if exchange == "a2a" and (heads % cp or kv_heads % cp):
            raise UnsupportedLayout(
                "cp_comm_type",
                got=f"'a2a' for layer {layer}",
                wanted=f"context_parallel_size={cp} to divide a rank's {heads} query and {kv_heads} key-value heads",
                remedy="use 'all_gather' there, or another layout",
            )
    return chosen


def positions_of(
    rank: int, cp: int, length: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """[S / cp] int64: the positions, of `length` in all, that this rank of context parallelism holds, in its order.

    Raises:
        UnsupportedLayout: a length that 2 x cp does not divide.
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


def gathered_in_order(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """What the ranks of context parallelism hold (in rank order), put together in the order of positions.

    Args:
        parts: one tensor a rank; along `dim` each has its S / cp positions.
    """
    whole = torch.cat(list(parts), dim=dim)
    length = whole.shape[dim]
    held = torch.cat(
        [positions_of(rank, len(parts), length, whole.device) for rank in range(len(parts))]
    )
    return whole.index_select(dim, held.argsort())
