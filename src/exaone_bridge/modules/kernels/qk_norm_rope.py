"""One Triton kernel for the split of the fused QKV projection, QK norm, and RoPE.

As separate operations these are seven kernels in the forward pass and nine in the backward pass
(with norms), each of which reads and writes all queries or all keys.

Axes: S sequence, B batch, R = S * B rows, N query heads of this rank, G KV heads (query groups) of
this rank, D head, P programs along R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["qk_norm_rope"]

_TOKENS = 16  # rows per program


@triton.jit
def _cos_sin(angles, row, low_at, batch, mask, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load cos and sin [TOKENS, D/2] of the rows' angles; angles [S, D]."""
    angle = tl.load(angles + (row // batch)[:, None] * (2 * HALF) + low_at, mask, other=0.0).to(
        tl.float32
    )
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, query, key, value, query_weight, key_weight, angles, rows, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Run one program: TOKENS rows of one query group.

    qkv [R, G, N/G + 2, D] -> query [R, N, D], key [R, G, D], value [R, G, D].
    """
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    index = tl.arange(0, HALF)[None, :]
    # RoPE rotates pairs of elements: neighbours if INTERLEAVED, otherwise one of each half.
    low_at = 2 * index if INTERLEAVED else index
    high_at = low_at + 1 if INTERLEAVED else low_at + HALF
    mask = (row < rows)[:, None] & (index < HALF)
    if ROPE:
        cos, sin = _cos_sin(angles, row, low_at, batch, mask, HALF)
    for head in tl.static_range(QUERIES + 2):
        source = qkv + ((row * GROUPS + group) * (QUERIES + 2) + head)[:, None] * (2 * HALF)
        low = tl.load(source + low_at, mask, other=0.0)
        high = tl.load(source + high_at, mask, other=0.0)
        if head <= QUERIES:
            low = low.to(tl.float32)
            high = high.to(tl.float32)
            if NORM:
                weight = query_weight if head < QUERIES else key_weight
                inverse_rms = tl.rsqrt(
                    (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps
                )[:, None]
                low *= inverse_rms * tl.load(weight + low_at).to(tl.float32)
                high *= inverse_rms * tl.load(weight + high_at).to(tl.float32)
            if ROPE:
                low, high = low * cos - high * sin, high * cos + low * sin
        if head < QUERIES:
            target = query + ((row * GROUPS + group) * QUERIES + head)[:, None] * (2 * HALF)
        elif head == QUERIES:
            target = key + (row * GROUPS + group)[:, None] * (2 * HALF)
        else:
            target = value + (row * GROUPS + group)[:, None] * (2 * HALF)
        tl.store(target + low_at, low.to(qkv.dtype.element_ty), mask)
        tl.store(target + high_at, high.to(qkv.dtype.element_ty), mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    qkv, grad_query, grad_key, grad_value, query_weight, key_weight, angles,
    grad_qkv, grad_weights, rows, batch, eps,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Run one program: TOKENS rows of one query group, in the shapes of `_forward`.

    grad_weights [P * G, 2, D] fp32: each program's sums for the weights of QK norm.
    """
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    index = tl.arange(0, HALF)[None, :]
    low_at = 2 * index if INTERLEAVED else index
    high_at = low_at + 1 if INTERLEAVED else low_at + HALF
    mask = (row < rows)[:, None] & (index < HALF)
    if ROPE:
        cos, sin = _cos_sin(angles, row, low_at, batch, mask, HALF)
    sum_low = tl.zeros([1, HALF], tl.float32)
    sum_high = tl.zeros([1, HALF], tl.float32)
    if NORM:
        partial = grad_weights + (tl.program_id(0) * GROUPS + group).to(tl.int64) * (4 * HALF)
    for head in tl.static_range(QUERIES + 2):
        offset = ((row * GROUPS + group) * (QUERIES + 2) + head)[:, None] * (2 * HALF)
        if head < QUERIES:
            source = grad_query + ((row * GROUPS + group) * QUERIES + head)[:, None] * (2 * HALF)
        elif head == QUERIES:
            source = grad_key + (row * GROUPS + group)[:, None] * (2 * HALF)
        else:
            source = grad_value + (row * GROUPS + group)[:, None] * (2 * HALF)
        grad_low = tl.load(source + low_at, mask, other=0.0)
        grad_high = tl.load(source + high_at, mask, other=0.0)
        if head <= QUERIES:
            grad_low = grad_low.to(tl.float32)
            grad_high = grad_high.to(tl.float32)
            if ROPE:
                grad_low, grad_high = (
                    grad_low * cos + grad_high * sin,
                    grad_high * cos - grad_low * sin,
                )
            if NORM:
                weight = query_weight if head < QUERIES else key_weight
                low = tl.load(qkv + offset + low_at, mask, other=0.0).to(tl.float32)
                high = tl.load(qkv + offset + high_at, mask, other=0.0).to(tl.float32)
                inverse_rms = tl.rsqrt(
                    (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * HALF) + eps
                )[:, None]
                low *= inverse_rms
                high *= inverse_rms
                sum_low += tl.sum(grad_low * low, 0)[None, :]
                sum_high += tl.sum(grad_high * high, 0)[None, :]
                grad_low *= tl.load(weight + low_at).to(tl.float32)
                grad_high *= tl.load(weight + high_at).to(tl.float32)
                projection = (
                    (tl.sum(grad_low * low, 1) + tl.sum(grad_high * high, 1)) / (2 * HALF)
                )[:, None]
                grad_low = inverse_rms * (grad_low - low * projection)
                grad_high = inverse_rms * (grad_high - high * projection)
                if head >= QUERIES - 1:  # after the last query, and after the key
                    tl.store(partial + (head - QUERIES + 1) * 2 * HALF + low_at, sum_low)
                    tl.store(partial + (head - QUERIES + 1) * 2 * HALF + high_at, sum_high)
                    sum_low = tl.zeros([1, HALF], tl.float32)
                    sum_high = tl.zeros([1, HALF], tl.float32)
        tl.store(grad_qkv + offset + low_at, grad_low.to(grad_qkv.dtype.element_ty), mask)
        tl.store(grad_qkv + offset + high_at, grad_high.to(grad_qkv.dtype.element_ty), mask)


@dataclass(frozen=True, slots=True)
class _Options:
    """The arguments of `qk_norm_rope` that are not tensors."""

    head_dim: int
    eps: float
    interleaved: bool


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        query_weight: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        angles: torch.Tensor | None,
        options: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (length, batch, groups, width), head_dim = qkv.shape, options.head_dim
        queries = width // head_dim - 2
        query = qkv.new_empty(length, batch, groups * queries, head_dim)
        key, value = (qkv.new_empty(length, batch, groups, head_dim) for _ in range(2))
        grid = (triton.cdiv(length * batch, _TOKENS), groups)
        scalars = (length * batch, batch, options.eps)
        constants = {
            "GROUPS": groups,
            "QUERIES": queries,
            "HALF": head_dim // 2,
            "TOKENS": _TOKENS,
            "INTERLEAVED": options.interleaved,
            "NORM": query_weight is not None,
            "ROPE": angles is not None,
        }
        _forward[grid](
            qkv, query, key, value, query_weight, key_weight, angles, *scalars, **constants
        )
        # Without norms the gradient does not depend on the input.
        ctx.save_for_backward(
            qkv if query_weight is not None else None, query_weight, key_weight, angles
        )
        ctx.launch = qkv.shape, grid, scalars, constants
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qkv, query_weight, key_weight, angles = ctx.saved_tensors
        shape, grid, scalars, constants = ctx.launch
        grad_qkv = grads[0].new_empty(shape)
        grad_weights = None
        if qkv is not None:
            programs = grid[0] * grid[1]
            grad_weights = qkv.new_empty(programs, 2, 2 * constants["HALF"], dtype=torch.float32)
        grads = tuple(grad.contiguous() for grad in grads)
        _backward[grid](
            qkv, *grads, query_weight, key_weight, angles, grad_qkv, grad_weights,
            *scalars, **constants,
        )  # fmt: skip
        if grad_weights is None:
            return grad_qkv, None, None, None, None
        grad_query_weight, grad_key_weight = grad_weights.sum(0)
        return (
            grad_qkv,
            grad_query_weight.type_as(query_weight),
            grad_key_weight.type_as(key_weight),
            None,
            None,
        )


def qk_norm_rope(
    qkv: torch.Tensor,
    head_dim: int,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    angles: torch.Tensor | None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused projection, then apply QK norm and RoPE to queries and keys in fp32.

    RMSNorm is x / sqrt(mean(x^2) + eps) * weight over D. RoPE rotates (x[i], x[i + D/2]) by angle i
    as `apply_rotary_pos_emb` of Transformers 5.12.1's `modeling_exaone4.py` does, or
    (x[2i], x[2i + 1]) as that of `modeling_ernie4_5.py` does.

    Args:
        qkv: [S, B, G, (N/G + 2) * D] on a GPU: per group its queries, its key, and its value.
        head_dim: D, a power of two, at least 32.
        weights: [D] of the query norm and [D] of the key norm; None: no norms.
        eps: of both norms.
        angles: [S, ..., D] in radians, each pair's angle at both elements; None: no RoPE.
        interleaved: whether RoPE's pairs are neighbours.

    Returns:
        Query [S, B, N, D], key [S, B, G, D] and value [S, B, G, D].
    """
    if angles is not None:
        angles = angles.reshape(qkv.shape[0], -1).float().contiguous()
    query_weight, key_weight = weights or (None, None)
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    result = _QKNormRope.apply(
        qkv.contiguous(), query_weight, key_weight, angles, _Options(head_dim, eps, interleaved)
    )
    return result
