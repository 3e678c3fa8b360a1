"""Our Triton kernels' outputs and gradients against the formula in plain torch, on torch's default device.

Run as a script, it checks everything; on the CPU that needs Triton's interpreter (TRITON_INTERPRET=1), which is chosen
when Triton is imported.

Raises:
    AssertionError: they differ.
"""

from __future__ import annotations

import itertools

import torch

from exaone_bridge.modules.kernels.qk_norm_rope import qk_norm_rope
from exaone_bridge.modules.kernels.swiglu import swiglu


def check_swiglu(rows: int, width: int, dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(rows, 2 * width, dtype=dtype).requires_grad_()
    weights = torch.rand(rows).requires_grad_() if weighted else None
    upstream = torch.randn(rows, width)
    swiglu(x, weights).backward(upstream.to(dtype))
    exact = x.detach().double().requires_grad_()
    exact_weights = (
        torch.ones(rows) if weights is None else weights.detach().clone().requires_grad_()
    )
    gate, up = exact.chunk(2, dim=-1)
    truth = torch.nn.functional.silu(gate) * up * exact_weights[:, None]
    truth.backward(upstream.to(dtype).double())
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(swiglu(x, weights).double(), truth, **tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)
    if weights is not None:
        torch.testing.assert_close(weights.grad, exact_weights.grad, rtol=1e-4, atol=1e-4)


def check_qk_norm_rope(
    shape: tuple[int, int, int, int, int], rotate: bool, normed: bool = True, pairs: bool = False
) -> None:
    length, batch, groups, queries, dim = shape
    mixed = torch.randn(length, batch, groups, (queries + 2) * dim).requires_grad_()
    weights = [torch.randn(dim).requires_grad_() for _ in range(2)] if normed else []
    half = torch.outer(torch.arange(length) + 7.0, 1.0 / 10000 ** (torch.arange(0, dim, 2) / dim))
    whole = half.repeat_interleave(2, dim=-1) if pairs else torch.cat([half, half], dim=-1)
    angles = whole[:, None, None] if rotate else None
    found = qk_norm_rope(mixed, dim, tuple(weights) or None, 1e-5, angles, pairs)
    upstream = [torch.randn_like(tensor) for tensor in found]
    torch.autograd.backward(found, upstream)

    exact = mixed.detach().clone().requires_grad_()
    exact_weights = [weight.detach().clone().requires_grad_() for weight in weights]
    query, key, value = exact.view(length, batch, groups, queries + 2, dim).split(
        [queries, 1, 1], dim=3
    )

    def turned(x: torch.Tensor, which: int) -> torch.Tensor:
        x = x.reshape(length, batch, -1, dim)
        if normed:
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * exact_weights[which]
        if angles is None:
            return x
        low, high = (x[..., ::2], x[..., 1::2]) if pairs else x.chunk(2, dim=-1)
        across = (
            torch.stack([-high, low], dim=-1).flatten(-2)
            if pairs
            else torch.cat([-high, low], dim=-1)
        )
        return x * angles.cos() + across * angles.sin()

    truth = turned(query, 0), turned(key, 1), value.reshape(length, batch, groups, dim)
    torch.autograd.backward(truth, upstream)
    for one, other in zip(found, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed.grad, exact.grad, rtol=1e-4, atol=1e-4)
    for weight, exact_weight in zip(weights, exact_weights, strict=True):
        torch.testing.assert_close(weight.grad, exact_weight.grad, rtol=1e-4, atol=1e-3)


def check_all() -> None:
    torch.manual_seed(0)
    for rows, width, dtype, weighted in itertools.product(
        (3, 0), (40, 1500), (torch.float32, torch.bfloat16), (True, False)
    ):
        check_swiglu(rows, width, dtype, weighted)
    for shape in ((21, 2, 2, 3, 32), (16, 1, 1, 1, 64), (5, 3, 2, 5, 128)):
        for rotate, normed, pairs in (
            (True, True, False),
            (False, True, False),
            (True, False, True),
            (True, True, True),
        ):
            check_qk_norm_rope(shape, rotate, normed, pairs)


if __name__ == "__main__":
    check_all()
