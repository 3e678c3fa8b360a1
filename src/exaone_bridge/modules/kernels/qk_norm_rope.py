"""Queries, keys and values from the fused projection in one kernel: split, RMSNorm of queries and keys, RoPE.

Apart, with norms, these are seven kernels forward and nine backward, each of which reads and writes all queries or all
keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["qk_norm_rope"]

_TOKENS = 16  # of one program, for one group of heads


@triton.jit
def _turns(angles, row, low_at, batch, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    angle = tl.load(angles + (row // batch)[:, None] * (2 * HALF) + low_at, inside, other=0.0).to(
        tl.float32
    )
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    mixed, query, key, value, query_weight, key_weight, angles, rows, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    index = tl.arange(0, HALF)[None, :]
    low_at = (
        2 * index if PAIRS else index
    )  # what is rotated together: neighbours, or one of each half
    high_at = low_at + 1 if PAIRS else low_at + HALF
    inside = (row < rows)[:, None] & (index < HALF)
    if ROTATE:
        cosine, sine = _turns(angles, row, low_at, batch, inside, HALF)
    for head in tl.static_range(QUERIES + 2):
        source = mixed + ((row * GROUPS + group) * (QUERIES + 2) + head)[:, None] * (2 * HALF)
        low = tl.load(source + low_at, inside, other=0.0)
        high = tl.load(source + high_at, inside, other=0.0)
        if head <= QUERIES:
            low = low.to(tl.float32)
            high = high.to(tl.float32)
            if NORM:
                weight = query_weight if head < QUERIES else key_weight
                inverse = tl.rsqrt(
                    (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps
                )[:, None]
                low *= inverse * tl.load(weight + low_at).to(tl.float32)
                high *= inverse * tl.load(weight + high_at).to(tl.float32)
            if ROTATE:
                low, high = low * cosine - high * sine, high * cosine + low * sine
        if head < QUERIES:
            place = query + ((row * GROUPS + group) * QUERIES + head)[:, None] * (2 * HALF)
        elif head == QUERIES:
            place = key + (row * GROUPS + group)[:, None] * (2 * HALF)
        else:
            place = value + (row * GROUPS + group)[:, None] * (2 * HALF)
        tl.store(place + low_at, low.to(mixed.dtype.element_ty), inside)
        tl.store(place + high_at, high.to(mixed.dtype.element_ty), inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    mixed, of_query, of_key, of_value, query_weight, key_weight, angles, of_mixed, of_weights, rows, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    index = tl.arange(0, HALF)[None, :]
    low_at = (
        2 * index if PAIRS else index
    )  # what is rotated together: neighbours, or one of each half
    high_at = low_at + 1 if PAIRS else low_at + HALF
    inside = (row < rows)[:, None] & (index < HALF)
    if ROTATE:
        cosine, sine = _turns(angles, row, low_at, batch, inside, HALF)
    sum_low = tl.zeros([1, HALF], tl.float32)
    sum_high = tl.zeros([1, HALF], tl.float32)
    if NORM:
        partial = of_weights + (tl.program_id(0) * GROUPS + group).to(tl.int64) * (4 * HALF)
    for head in tl.static_range(QUERIES + 2):
        offset = ((row * GROUPS + group) * (QUERIES + 2) + head)[:, None] * (2 * HALF)
        if head < QUERIES:
            place = of_query + ((row * GROUPS + group) * QUERIES + head)[:, None] * (2 * HALF)
        elif head == QUERIES:
            place = of_key + (row * GROUPS + group)[:, None] * (2 * HALF)
        else:
            place = of_value + (row * GROUPS + group)[:, None] * (2 * HALF)
        of_low = tl.load(place + low_at, inside, other=0.0)
        of_high = tl.load(place + high_at, inside, other=0.0)
        if head <= QUERIES:
            of_low = of_low.to(tl.float32)
            of_high = of_high.to(tl.float32)
            if ROTATE:
                of_low, of_high = of_low * cosine + of_high * sine, of_high * cosine - of_low * sine
            if NORM:
                weight = query_weight if head < QUERIES else key_weight
                low = tl.load(mixed + offset + low_at, inside, other=0.0).to(tl.float32)
                high = tl.load(mixed + offset + high_at, inside, other=0.0).to(tl.float32)
                inverse = tl.rsqrt(
                    (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps
                )[:, None]
                low *= inverse
                high *= inverse
                sum_low += tl.sum(of_low * low, 0)[None, :]
                sum_high += tl.sum(of_high * high, 0)[None, :]
                of_low *= tl.load(weight + low_at).to(tl.float32)
                of_high *= tl.load(weight + high_at).to(tl.float32)
                along = ((tl.sum(of_low * low, 1) + tl.sum(of_high * high, 1)) / (2 * HALF))[
                    :, None
                ]
                of_low = inverse * (of_low - low * along)
                of_high = inverse * (of_high - high * along)
                if head >= QUERIES - 1:  # after the last query, and after the key
                    tl.store(partial + (head - QUERIES + 1) * 2 * HALF + low_at, sum_low)
                    tl.store(partial + (head - QUERIES + 1) * 2 * HALF + high_at, sum_high)
                    sum_low = tl.zeros([1, HALF], tl.float32)
                    sum_high = tl.zeros([1, HALF], tl.float32)
        tl.store(of_mixed + offset + low_at, of_low.to(of_mixed.dtype.element_ty), inside)
        tl.store(of_mixed + offset + high_at, of_high.to(of_mixed.dtype.element_ty), inside)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        angles: torch.Tensor | None,
        options: tuple[int, float, bool],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (length, batch, groups, width), (dim, eps, pairs) = mixed.shape, options
        queries = width // dim - 2
        query = mixed.new_empty(length, batch, groups * queries, dim)
        key, value = (mixed.new_empty(length, batch, groups, dim) for _ in range(2))
        grid, numbers = (triton.cdiv(length * batch, _TOKENS), groups), (length * batch, batch, eps)
        sizes = {
            "GROUPS": groups,
            "QUERIES": queries,
            "HALF": dim // 2,
            "TOKENS": _TOKENS,
            "PAIRS": pairs,
        }
        sizes |= {"NORM": query_weight is not None, "ROTATE": angles is not None}
        _forward[grid](
            mixed, query, key, value, query_weight, key_weight, angles, *numbers, **sizes
        )
        # Without norms the gradient does not depend on what was split.
        ctx.save_for_backward(
            mixed if query_weight is not None else None, query_weight, key_weight, angles
        )
        ctx.launch = mixed.shape, grid, numbers, sizes
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mixed, query_weight, key_weight, angles = ctx.saved_tensors
        shape, grid, numbers, sizes = ctx.launch
        of_mixed = gradients[0].new_empty(shape)
        of_weights = None
        if mixed is not None:
            of_weights = mixed.new_empty(
                grid[0] * grid[1], 2, 2 * sizes["HALF"], dtype=torch.float32
            )
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        _backward[grid](
            mixed, *gradients, query_weight, key_weight, angles, of_mixed, of_weights, *numbers, **sizes
        )  # fmt: skip
        if of_weights is None:
            return of_mixed, None, None, None, None
        of_query_weight, of_key_weight = of_weights.sum(0)
        return (
            of_mixed,
            of_query_weight.type_as(query_weight),
            of_key_weight.type_as(key_weight),
            None,
            None,
        )


def qk_norm_rope(
    mixed: torch.Tensor,
    dim: int,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    angles: torch.Tensor | None,
    pairs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [S, B, N, D] and key [S, B, G, D], normalised then rotated in fp32, and value [S, B, G, D].

    RMSNorm is x / sqrt(mean(x^2) + eps) * weight over D; RoPE rotates (x[i], x[i + D/2]) by angle i, as
    `transformers.models.exaone4.modeling_exaone4` does, or (x[2i], x[2i + 1]), as ERNIE's does.

    Args:
        mixed: [S, B, G, (N/G + 2) * D] on a GPU: of each group its queries, then its key, then its value.
        dim: D, a power of two, at least 32.
        weights: [D] of the queries' norm and of the keys'; None: no norms.
        angles: [S, ..., D] in radians, each pair's at both its places; None: no rotation.
        pairs: whether neighbours are rotated together.
    """
    if angles is not None:
        angles = angles.reshape(mixed.shape[0], -1).float().contiguous()
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _QKNormRope.apply(
        mixed.contiguous(), *(weights or (None, None)), angles, (dim, eps, pairs)
    )
    return result
