"""Grouped products of experts, on the CPU: `grouped_mm` takes any bf16 there. On the GPU: tests/gpu/test_experts.py."""

from __future__ import annotations

import pytest
import torch

from exaone_bridge.modules.grouped_experts import grouped_products, stacked


def _weights(adjacent: bool) -> list[torch.Tensor]:
    torch.manual_seed(3)
    whole = torch.randn(4, 24, 16).bfloat16()
    places = list(whole) if adjacent else [weight.clone() for weight in whole]
    return [torch.nn.Parameter(place) for place in places]


def test_stacked_is_a_view_only_of_neighbours_in_order() -> None:
    together, apart = _weights(True), _weights(False)
    assert stacked(together).data_ptr() == together[0].data_ptr()
    assert torch.equal(stacked(together), stacked(apart))
    swapped = [together[1], together[0], *together[2:]]
    assert torch.equal(stacked(swapped), torch.stack(swapped))
    assert stacked(swapped).data_ptr() not in {weight.data_ptr() for weight in together}


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("counts", [[3, 5, 1, 7], [0, 9, 0, 7], [16, 0, 0, 0]])
def test_products_and_gradients_are_those_of_each_expert(counts: list[int], adjacent: bool) -> None:
    weights = _weights(adjacent)
    x = torch.randn(sum(counts), 16).bfloat16().requires_grad_()
    upstream = torch.randn(sum(counts), 24).bfloat16()
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    y = grouped_products(x, ends, weights)
    y.backward(upstream)

    rows = list(zip(x.detach().split(counts), upstream.split(counts), weights, strict=True))
    torch.testing.assert_close(y, torch.cat([part @ weight.t() for part, _, weight in rows]))
    torch.testing.assert_close(
        x.grad, torch.cat([gradient @ weight for _, gradient, weight in rows])
    )
    for part, gradient, weight in rows:
        torch.testing.assert_close(weight.grad, gradient.t() @ part)
