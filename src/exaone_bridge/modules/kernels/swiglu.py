"""SwiGLU as one kernel each way, with or without a weight for each row (a routed expert's probability).

What torch.compile makes of Megatron-Core's own, `fused_bias_swiglu.py`, takes up to three times as long as the bytes
it moves would: in backward it computes both halves of the gradient for either half of the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["SwiGLU", "swiglu"]

_BLOCK = 1024


@triton.jit
def _forward(x, weights, y, width, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(x + row * 2 * width + columns, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, inside).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(y + row * width + columns, result.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, weights, of_y, of_x, of_weights, width, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    scale = 1.0
    if WEIGHTED:
        scale = tl.load(weights + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        gate = tl.load(x + row * 2 * width + columns, inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + columns, inside, other=0.0).to(tl.float32)
        gradient = tl.load(of_y + row * width + columns, inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            total += tl.sum(gradient * silu * up)
        gradient *= scale
        of_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(of_x + row * 2 * width + columns, of_gate.to(of_x.dtype.element_ty), inside)
        tl.store(
            of_x + row * 2 * width + width + columns,
            (gradient * silu).to(of_x.dtype.element_ty),
            inside,
        )
    if WEIGHTED:
        tl.store(of_weights + row, total)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        if rows:
            _forward[rows, triton.cdiv(width, _BLOCK)](
                x, weights, y, width, BLOCK=_BLOCK, WEIGHTED=weights is not None
            )
        ctx.save_for_backward(x, weights)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, weights = ctx.saved_tensors
        of_x = torch.empty_like(x)
        of_weights = None if weights is None else torch.empty_like(weights, dtype=torch.float32)
        if x.shape[0]:
            numbers = {"BLOCK": _BLOCK, "WEIGHTED": weights is not None}
            _backward[x.shape[0],](
                x, weights, gradient.contiguous(), of_x, of_weights, x.shape[1] // 2, **numbers
            )
        return of_x, of_weights.to(weights.dtype) if of_weights is not None else None


def swiglu(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up [* weight], in fp32, rounded once: [..., 2F], gate first, and [rows] -> [..., F].

    Args:
        x: on a GPU, in any floating-point type.
        weights: one number for each of x's rows, in any floating-point type; None: 1.
    """
    result: torch.Tensor = _SwiGLU.apply(x.reshape(-1, x.shape[-1]).contiguous(), weights)
    return result.view(*x.shape[:-1], x.shape[-1] // 2)


class SwiGLU(torch.nn.Module):
    """`swiglu` as what Megatron-Core's MLP builds for `use_te_activation_func`: [..., 2F] -> [..., F]."""

    def __init__(self, *, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu(x)
