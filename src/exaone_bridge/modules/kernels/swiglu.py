"""SwiGLU as one Triton kernel per pass, with or without a weight per row.

The weights are the routing probabilities of a routed expert's tokens. Megatron-Core 0.19.2's own
version (`fusions/fused_bias_swiglu.py`, through torch.compile) takes up to three times as long as
its memory traffic: in the backward pass it computes both halves of the gradient for each half of
the output.

Axes: R rows (tokens), F MLP width.
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
def _forward(  # type: ignore[no-untyped-def]
    x, weights, y, width, limit, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, CLAMPED: tl.constexpr
):
    """Run one program: one block of one row. x [R, 2F], weights [R], y [R, F]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(x + row * 2 * width + columns, mask).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, mask).to(tl.float32)
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    result = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(y + row * width + columns, result.to(y.dtype.element_ty), mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    x, weights, grad_y, grad_x, grad_weights, width, limit,
    BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """Run one program: one row. x, grad_x [R, 2F], grad_y [R, F], weights, grad_weights [R]."""
    row = tl.program_id(0).to(tl.int64)
    grad_weight = 0.0
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + row).to(tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        gate = tl.load(x + row * 2 * width + columns, mask, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + columns, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + row * width + columns, mask, other=0.0).to(tl.float32)
        if CLAMPED:  # as torch.clamp: the gradient passes on a limit, and is zero beyond it
            gate_passes = gate <= limit
            up_passes = (up >= -limit) & (up <= limit)
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            grad_weight += tl.sum(grad * silu * up)
        grad *= weight
        grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_up = grad * silu
        if CLAMPED:
            grad_gate = tl.where(gate_passes, grad_gate, 0.0)
            grad_up = tl.where(up_passes, grad_up, 0.0)
        out = grad_x + row * 2 * width + columns
        tl.store(out, grad_gate.to(grad_x.dtype.element_ty), mask)
        tl.store(out + width, grad_up.to(grad_x.dtype.element_ty), mask)
    if WEIGHTED:
        tl.store(grad_weights + row, grad_weight)


class _SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor | None, limit: float | None
    ) -> torch.Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        if rows:
            grid = (rows, triton.cdiv(width, _BLOCK))
            _forward[grid](x, weights, y, width, *_constants(weights, limit))
        ctx.save_for_backward(x, weights)
        ctx.limit = limit
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weights = ctx.saved_tensors
        rows, width = x.shape[0], x.shape[1] // 2
        grad_x = torch.empty_like(x)
        grad_weights = None if weights is None else torch.empty_like(weights, dtype=torch.float32)
        if rows:
            constants = _constants(weights, ctx.limit)
            _backward[rows,](x, weights, grad.contiguous(), grad_x, grad_weights, width, *constants)
        return grad_x, grad_weights.to(weights.dtype) if grad_weights is not None else None, None


def _constants(weights: torch.Tensor | None, limit: float | None) -> tuple[float, int, bool, bool]:
    """Return limit, BLOCK, WEIGHTED and CLAMPED of the kernels."""
    return limit or 0.0, _BLOCK, weights is not None, limit is not None


def swiglu(
    x: torch.Tensor, weights: torch.Tensor | None = None, limit: float | None = None
) -> torch.Tensor:
    """Compute silu(gate) * up [* weight] in fp32, rounded once.

    Args:
        x: [..., 2F] on a GPU, gate then up, in any floating-point dtype.
        weights: [R], one for each row of `x`, in any floating-point dtype; None: 1.
        limit: gate is clamped to at most `limit`, and up to [-limit, limit], before SiLU (vLLM's
            SiluAndMulWithClamp, which K-EXAONE 2.0 uses); None: no clamp.

    Returns:
        [..., F] in the dtype of `x`.
    """
    result: torch.Tensor = _SwiGLUFunction.apply(
        x.reshape(-1, x.shape[-1]).contiguous(), weights, limit
    )
    return result.view(*x.shape[:-1], x.shape[-1] // 2)


class SwiGLU(torch.nn.Module):
    """`swiglu` as the module that Megatron-Core's MLP builds with `use_te_activation_func`.

    The limit is the config's `activation_func_clamp_value`.
    """

    def __init__(self, *, config: TransformerConfig) -> None:
        super().__init__()
        self.limit = config.activation_func_clamp_value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute SwiGLU: [..., 2F] -> [..., F]."""
        return swiglu(x, limit=self.limit)
