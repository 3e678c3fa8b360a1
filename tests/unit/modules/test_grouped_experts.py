"""Grouped linears of experts on the CPU, where `grouped_mm` takes any bf16 tensors.

tests/gpu/test_fast_paths.py tests them on the GPU.
"""

from __future__ import annotations

import pytest
import torch

from exaone_bridge.modules.grouped_experts import grouped_linear, stack_weights


def _weights(adjacent: bool) -> list[torch.Tensor]:
    """Four weights [24, 16], in one storage if `adjacent`."""
    torch.manual_seed(3)
    stack = torch.randn(4, 24, 16).bfloat16()
    weights = list(stack) if adjacent else [weight.clone() for weight in stack]
    return [torch.nn.Parameter(weight) for weight in weights]


def test_stack_weights_is_a_view_only_of_adjacent_weights_in_order() -> None:
    adjacent, separate = _weights(True), _weights(False)
    assert stack_weights(adjacent).data_ptr() == adjacent[0].data_ptr()
    assert torch.equal(stack_weights(adjacent), stack_weights(separate))
    swapped = [adjacent[1], adjacent[0], *adjacent[2:]]
    assert torch.equal(stack_weights(swapped), torch.stack(swapped))
    assert stack_weights(swapped).data_ptr() not in {weight.data_ptr() for weight in adjacent}


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("counts", [[3, 5, 1, 7], [0, 9, 0, 7], [16, 0, 0, 0]])
def test_grouped_linear_equals_separate_products(counts: list[int], adjacent: bool) -> None:
    weights = _weights(adjacent)
    x = torch.randn(sum(counts), 16).bfloat16().requires_grad_()
    grad_y = torch.randn(sum(counts), 24).bfloat16()
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    y = grouped_linear(x, ends, weights)
    y.backward(grad_y)

    experts = list(zip(x.detach().split(counts), grad_y.split(counts), weights, strict=True))
    torch.testing.assert_close(y, torch.cat([rows @ weight.t() for rows, _, weight in experts]))
    torch.testing.assert_close(x.grad, torch.cat([grad @ weight for _, grad, weight in experts]))
    for rows, grad, weight in experts:
        torch.testing.assert_close(weight.grad, grad.t() @ rows)
