"""Queries, keys and values from the fused projection in one kernel: split, RMSNorm of queries and keys, RoPE.

Apart, these are seven kernels forward and nine backward, each of which reads and writes all queries or keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["qk_norm_rope"]

_TOKENS = 16  # of one program, for one group of heads


@triton.jit
def _angles(angles, row, columns, batch, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    angle = tl.load(angles + (row // batch)[:, None] * (2 * HALF) + columns, inside, other=0.0).to(tl.float32)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    mixed, query, key, value, query_weight, key_weight, angles, rows, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (columns < HALF)
    if ROTATE:
        cosine, sine = _angles(angles, row, columns, batch, inside, HALF)
    for head in tl.static_range(QUERIES + 2):
        source = mixed + ((row * GROUPS + group) * (QUERIES + 2) + head)[:, None] * (2 * HALF) + columns
        low = tl.load(source, inside, other=0.0)
        high = tl.load(source + HALF, inside, other=0.0)
        if head <= QUERIES:
            weight = query_weight if head < QUERIES else key_weight
            low = low.to(tl.float32)
            high = high.to(tl.float32)
            inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
            low *= inverse * tl.load(weight + columns).to(tl.float32)
            high *= inverse * tl.load(weight + HALF + columns).to(tl.float32)
            if ROTATE:
                low, high = low * cosine - high * sine, high * cosine + low * sine
        if head < QUERIES:
            place = query + ((row * GROUPS + group) * QUERIES + head)[:, None] * (2 * HALF) + columns
        elif head == QUERIES:
            place = key + (row * GROUPS + group)[:, None] * (2 * HALF) + columns
        else:
            place = value + (row * GROUPS + group)[:, None] * (2 * HALF) + columns
        tl.store(place, low.to(mixed.dtype.element_ty), inside)
        tl.store(place + HALF, high.to(mixed.dtype.element_ty), inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    mixed, of_query, of_key, of_value, query_weight, key_weight, angles, of_mixed, of_weights, rows, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, HALF)[None, :]
    inside = (row < rows)[:, None] & (columns < HALF)
    if ROTATE:
        cosine, sine = _angles(angles, row, columns, batch, inside, HALF)
    sum_low = tl.zeros([HALF], tl.float32)
    sum_high = tl.zeros([HALF], tl.float32)
    partial = of_weights + (tl.program_id(0) * GROUPS + group).to(tl.int64) * (4 * HALF) + tl.arange(0, HALF)
    for head in tl.static_range(QUERIES + 2):
        offset = ((row * GROUPS + group) * (QUERIES + 2) + head)[:, None] * (2 * HALF) + columns
        if head < QUERIES:
            place = of_query + ((row * GROUPS + group) * QUERIES + head)[:, None] * (2 * HALF) + columns
        elif head == QUERIES:
            place = of_key + (row * GROUPS + group)[:, None] * (2 * HALF) + columns
        else:
            place = of_value + (row * GROUPS + group)[:, None] * (2 * HALF) + columns
        of_low = tl.load(place, inside, other=0.0)
        of_high = tl.load(place + HALF, inside, other=0.0)
        if head <= QUERIES:
            weight = query_weight if head < QUERIES else key_weight
            of_low = of_low.to(tl.float32)
            of_high = of_high.to(tl.float32)
            if ROTATE:
                of_low, of_high = of_low * cosine + of_high * sine, of_high * cosine - of_low * sine
            low = tl.load(mixed + offset, inside, other=0.0).to(tl.float32)
            high = tl.load(mixed + offset + HALF, inside, other=0.0).to(tl.float32)
            inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps)[:, None]
            low *= inverse
            high *= inverse
            sum_low += tl.sum(of_low * low, 0)
            sum_high += tl.sum(of_high * high, 0)
            of_low *= tl.load(weight + columns).to(tl.float32)
            of_high *= tl.load(weight + HALF + columns).to(tl.float32)
            along = ((tl.sum(of_low * low, 1) + tl.sum(of_high * high, 1)) / (2 * HALF))[:, None]
            of_low = inverse * (of_low - low * along)
            of_high = inverse * (of_high - high * along)
            if head >= QUERIES - 1:  # after the last query, and after the key
                tl.store(partial + (head - QUERIES + 1) * 2 * HALF, sum_low)
                tl.store(partial + (head - QUERIES + 1) * 2 * HALF + HALF, sum_high)
                sum_low = tl.zeros([HALF], tl.float32)
                sum_high = tl.zeros([HALF], tl.float32)
        tl.store(of_mixed + offset, of_low.to(mixed.dtype.element_ty), inside)
        tl.store(of_mixed + offset + HALF, of_high.to(mixed.dtype.element_ty), inside)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: torch.Tensor,
        query_weight: torch.Tensor,
        key_weight: torch.Tensor,
        angles: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (length, batch, groups, width), dim = mixed.shape, query_weight.shape[0]
        queries = width // dim - 2
        query = mixed.new_empty(length, batch, groups * queries, dim)
        key, value = (mixed.new_empty(length, batch, groups, dim) for _ in range(2))
        grid = triton.cdiv(length * batch, _TOKENS), groups
        numbers = (angles, length * batch, batch, eps)
        sizes = {
            "GROUPS": groups,
            "QUERIES": queries,
            "HALF": dim // 2,
            "TOKENS": _TOKENS,
            "ROTATE": angles is not None,
        }
        _forward[grid](mixed, query, key, value, query_weight, key_weight, *numbers, **sizes)
        ctx.save_for_backward(mixed, query_weight, key_weight, angles)
        ctx.launch = grid, numbers[1:], sizes
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mixed, query_weight, key_weight, angles = ctx.saved_tensors
        grid, numbers, sizes = ctx.launch
        of_mixed = torch.empty_like(mixed)
        of_weights = mixed.new_empty(grid[0] * grid[1], 2, query_weight.shape[0], dtype=torch.float32)
        _backward[grid](
            mixed, *(gradient.contiguous() for gradient in gradients), query_weight, key_weight, angles,
            of_mixed, of_weights, *numbers, **sizes,
        )  # fmt: skip
        of_query_weight, of_key_weight = of_weights.sum(0)
        return of_mixed, of_query_weight.type_as(query_weight), of_key_weight.type_as(key_weight), None, None


def qk_norm_rope(
    mixed: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    angles: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [S, B, N, D] and key [S, B, G, D], normalised then rotated in fp32, and value [S, B, G, D].

    RMSNorm is x / sqrt(mean(x^2) + eps) * weight over D; RoPE rotates (x[i], x[i + D/2]) by angle i, as
    `transformers.models.exaone4.modeling_exaone4` does.

    Args:
        mixed: [S, B, G, (N/G + 2) * D] on a GPU: of each group its queries, then its key, then its value. D is a power
            of two, at least 32.
        query_weight, key_weight: [D].
        angles: [S, ..., D] in radians, of which the first half is read; None: no rotation.
    """
    if angles is not None:
        angles = angles.reshape(mixed.shape[0], -1).float().contiguous()
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _QKNormRope.apply(mixed.contiguous(), query_weight, key_weight, angles, eps)
    return result
