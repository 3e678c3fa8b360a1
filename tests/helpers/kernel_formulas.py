"""Compare the Triton kernels' outputs and gradients with the formulas in torch.

Run as a script, it checks everything on torch's default device. On the CPU this needs Triton's
interpreter (TRITON_INTERPRET=1), which is chosen when Triton is imported.
"""

from __future__ import annotations

import itertools

import torch

from exaone_bridge.modules.kernels.qk_norm_rope import qk_norm_rope
from exaone_bridge.modules.kernels.swiglu import swiglu


def check_swiglu(
    rows: int, width: int, dtype: torch.dtype, weighted: bool, limit: float | None
) -> None:
    """Check `swiglu` on x [rows, 2 * width], with or without a weight per row and a clamp.

    Raises:
        AssertionError: output or gradients differ.
    """
    x = torch.randn(rows, 2 * width, dtype=dtype).requires_grad_()
    weights = torch.rand(rows).requires_grad_() if weighted else None
    grad_y = torch.randn(rows, width).to(dtype)
    swiglu(x, weights, limit).backward(grad_y)

    x_fp64 = x.detach().double().requires_grad_()
    expected_weights = torch.ones(rows)
    if weights is not None:
        expected_weights = weights.detach().clone().requires_grad_()
    gate, up = x_fp64.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    expected = torch.nn.functional.silu(gate) * up * expected_weights[:, None]
    expected.backward(grad_y.double())
    tolerance = dict.fromkeys(("rtol", "atol"), 1e-2 if dtype is torch.bfloat16 else 1e-5)
    torch.testing.assert_close(swiglu(x, weights, limit).double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), x_fp64.grad, **tolerance)
    if weights is not None:
        torch.testing.assert_close(weights.grad, expected_weights.grad, rtol=1e-4, atol=1e-4)


def check_qk_norm_rope(
    shape: tuple[int, int, int, int, int],
    rope: bool,
    norm: bool = True,
    interleaved: bool = False,
) -> None:
    """Check `qk_norm_rope`.

    Args:
        shape: sequence, batch, query groups, queries per group, head dimension.
        rope, norm: whether RoPE and QK norm are applied.
        interleaved: whether RoPE's pairs are neighbours.

    Raises:
        AssertionError: outputs or gradients differ.
    """
    length, batch, groups, queries, dim = shape
    qkv = torch.randn(length, batch, groups, (queries + 2) * dim).requires_grad_()
    weights = [torch.randn(dim).requires_grad_() for _ in range(2)] if norm else []
    half = torch.outer(torch.arange(length) + 7.0, 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim))
    full = half.repeat_interleave(2, dim=-1) if interleaved else torch.cat([half, half], dim=-1)
    angles = full[:, None, None] if rope else None
    outputs = qk_norm_rope(qkv, dim, tuple(weights) or None, 1e-5, angles, interleaved)
    grads = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, grads)

    expected_qkv = qkv.detach().clone().requires_grad_()
    expected_weights = [weight.detach().clone().requires_grad_() for weight in weights]
    heads = expected_qkv.view(length, batch, groups, queries + 2, dim)
    query, key, value = heads.split([queries, 1, 1], dim=3)

    def norm_and_rope(x: torch.Tensor, which: int) -> torch.Tensor:
        x = x.reshape(length, batch, -1, dim)
        if norm:
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * expected_weights[which]
        if angles is None:
            return x
        if interleaved:
            rotated = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        else:
            low, high = x.chunk(2, dim=-1)
            rotated = torch.cat([-high, low], dim=-1)
        return x * angles.cos() + rotated * angles.sin()

    expected = (
        norm_and_rope(query, 0),
        norm_and_rope(key, 1),
        value.reshape(length, batch, groups, dim),
    )
    torch.autograd.backward(expected, grads)
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(qkv.grad, expected_qkv.grad, rtol=1e-4, atol=1e-4)
    for weight, other in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-3)


def check_all() -> None:
    """Check both kernels in all their variants."""
    torch.manual_seed(0)
    for rows, width, dtype, weighted, limit in itertools.product(
        (3, 0), (40, 1500), (torch.float32, torch.bfloat16), (True, False), (None, 0.5)
    ):
        check_swiglu(rows, width, dtype, weighted, limit)
    for shape in ((21, 2, 2, 3, 32), (16, 1, 1, 1, 64), (5, 3, 2, 5, 128)):
        check_qk_norm_rope(shape, rope=True)
        check_qk_norm_rope(shape, rope=False)
        check_qk_norm_rope(shape, rope=True, norm=False, interleaved=True)
        check_qk_norm_rope(shape, rope=True, interleaved=True)


if __name__ == "__main__":
    check_all()
