"""What is faster than the host's own way is as exact: kernels, grouped products of experts, cross entropy."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from exaone_bridge.schema.parallel_layout import Layout
from tests.gpu.test_transformer_engine import wide
from tests.helpers import kernel_formulas


def _model(folder: Any, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(), dtype=dtype, **overrides)
    return model


def _experts(model: Any) -> list[Any]:
    from exaone_bridge.modules.grouped_experts import GroupedExperts

    return [module for module in model.modules() if isinstance(module, GroupedExperts)]


def test_kernels_are_their_formulas(nccl: None) -> None:
    with torch.device("cuda"):
        kernel_formulas.check_all()


@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b", "ernie45-dense"])
def test_fused_attention_is_as_exact_as_the_host_s(
    nccl: None, tiny: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bf16 gradient as near to that of fp32 without the kernel as bf16's without it; NoPE, and both RoPEs."""
    from exaone_bridge.modules import fused_attention

    calls = []
    kernel = fused_attention.qk_norm_rope
    monkeypatch.setattr(
        fused_attention, "qk_norm_rope", lambda *args: (calls.append(args), kernel(*args))[1]
    )
    tokens = torch.randint(
        512, (2, 301), device="cuda", generator=torch.Generator("cuda").manual_seed(6)
    )
    positions = torch.arange(300, device="cuda").expand(2, -1)
    folder = tiny(name, **wide(name), dtype="bfloat16")

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = _model(folder, dtype=dtype).train()
        loss = (
            model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
            .float()
            .mean()
        )
        loss.backward()
        found = {
            name.removeprefix("module."): each.grad.float()
            for name, each in model.named_parameters()
        }
        return found | {
            "layers": (model if dtype is torch.float32 else model.module).config.num_layers
        }

    ours = gradients(torch.bfloat16)
    layers = ours.pop("layers")
    assert len(calls) == layers
    assert sum(args[4] is None for args in calls) == (layers // 4 if name == "exaone4" else 0)
    monkeypatch.setattr(fused_attention.FusedSelfAttention, "_kernel_supports", lambda *_: False)
    theirs, truth = gradients(torch.bfloat16), gradients(torch.float32)
    assert len(calls) == layers
    apart = {
        key: ((one - truth[key]).norm(), (theirs[key] - truth[key]).norm())
        for key, one in ours.items()
    }
    for key, (
        one,
        other,
    ) in apart.items():  # a norm's weight has 64 gradients, few to tell noise from noise by
        assert one <= max(2 * other, 1e-3 * truth[key].norm()), (key, one, other)
        if "layernorm" not in key:
            assert one <= 1.2 * other, (key, one, other)
    norms = [pair for key, pair in apart.items() if "layernorm" in key]
    assert sum(one**2 for one, _ in norms) <= 1.2**2 * sum(other**2 for _, other in norms)


@pytest.mark.parametrize("counts", [[64, 0, 200, 8], [0, 0, 272, 0], [0, 1, 3, 0]])
def test_grouped_experts_are_each_expert_alone(nccl: None, tiny: Any, counts: list[int]) -> None:
    """Output and every gradient against fp32, expert by expert; also of experts that no token was sent to."""
    experts = _experts(_model(tiny("ernie45", **wide("ernie45"), dtype="bfloat16")))[0]
    counts = counts + [0] * (experts.num_local_experts - len(counts))
    generator = torch.Generator("cuda").manual_seed(4)
    x = (
        torch.randn(sum(counts), 256, device="cuda", generator=generator)
        .bfloat16()
        .requires_grad_()
    )
    probabilities = torch.rand(sum(counts), device="cuda", generator=generator).requires_grad_()
    upstream = torch.randn(sum(counts), 256, device="cuda", generator=generator).bfloat16()
    y, bias = experts(x, torch.tensor(counts, device="cuda"), probabilities)
    assert bias is None
    y.backward(upstream)

    exact = x.detach().float().requires_grad_(), probabilities.detach().clone().requires_grad_()
    names = [
        f"linear_fc{linear}.weight{index}" for linear in (1, 2) for index in range(len(counts))
    ]
    weights = {
        name: experts.get_parameter(name).detach().float().requires_grad_() for name in names
    }
    parts = []
    for index, (part, scale) in enumerate(
        zip(exact[0].split(counts), exact[1].split(counts), strict=True)
    ):
        gate, up = (part @ weights[f"linear_fc1.weight{index}"].t()).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up * scale[:, None]
        parts.append(hidden @ weights[f"linear_fc2.weight{index}"].t())
    torch.cat(parts).backward(upstream.float())

    def close(ours: torch.Tensor, truth: torch.Tensor) -> bool:
        return bool((ours.float() - truth).norm() <= 0.01 * truth.norm())

    assert close(y, torch.cat(parts))
    assert close(x.grad, exact[0].grad)
    assert close(probabilities.grad, exact[1].grad)
    for name in names:
        assert close(experts.get_parameter(name).grad, weights[name].grad), name


def test_experts_take_the_grouped_way_and_never_wait(
    nccl: None, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward of the layer without a copy to the CPU; the same gradients as Transformer Engine's way."""
    from exaone_bridge.modules import grouped_experts

    model = _model(tiny("ernie45", **wide("ernie45"), dtype="bfloat16")).train()
    layers = [layer.mlp for layer in model.module.decoder.layers if hasattr(layer.mlp, "experts")]
    x = torch.randn(300, 1, 256, device="cuda").bfloat16()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        inputs = x.clone().requires_grad_()
        layers[0](inputs)[0].float().pow(2).sum().backward()
        return [
            inputs.grad,
            *(parameter.grad for parameter in layers[0].parameters() if parameter.requires_grad),
        ]

    calls = []
    products = grouped_experts.grouped_linear
    monkeypatch.setattr(
        grouped_experts, "grouped_linear", lambda *args: (calls.append(args), products(*args))[1]
    )
    gradients()  # kernels are compiled, which waits
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 4
    monkeypatch.setattr(grouped_experts.GroupedExperts, "_grouped", lambda *_: False)
    theirs = gradients()
    assert len(calls) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.float() - other.float()).norm() <= 0.01 * other.float().norm()


def test_experts_lie_in_order_in_the_optimizer_s_buffers(nccl: None, tiny: Any) -> None:
    """Else every step would copy all experts twice, to have them in one piece."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig

    from exaone_bridge.modules.grouped_experts import stack_weights

    provider = AutoBridge.from_hf_pretrained(
        tiny("ernie45", **wide("ernie45"), dtype="bfloat16")
    ).to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(torch.bfloat16, {})
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True)
    )
    found = _experts(model[0])
    assert found
    for experts in found:
        for linear in (experts.linear_fc1, experts.linear_fc2):
            assert stack_weights(linear._weights()).data_ptr() == linear.weight0.data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((300, 3, 512), torch.float32),
        ((300, 3, 512), torch.bfloat16),
        ((32768, 1, 102400), torch.bfloat16),  # more elements than 32 bits count
    ],
)
def test_cross_entropy_is_torch_s(
    nccl: None, tiny: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Loss and gradient of Transformer Engine's cross entropy, as the model calls it, against torch's in fp32."""
    model = _model(tiny("exaone4", **wide("exaone4"), dtype="bfloat16"))
    assert model.module.config.cross_entropy_fusion_impl == "te"
    length, batch, words = shape
    generator = torch.Generator("cuda").manual_seed(5)
    logits = torch.randn(shape, device="cuda", dtype=dtype, generator=generator).mul_(3)
    logits[..., -7:] = torch.finfo(dtype).min  # as padded words are
    logits.requires_grad_()
    labels = torch.randint(words - 7, (batch, length), device="cuda", generator=generator)
    weights = torch.rand(batch, length, device="cuda", generator=generator)
    weights[:, :5] = 0.0
    losses = model.module.compute_language_model_loss(labels, logits)
    (losses * weights).sum().backward()

    for start in range(0, length, 1024):
        part = logits.detach()[start : start + 1024].float().requires_grad_()
        target = labels.t()[start : start + 1024]
        exact = torch.nn.functional.cross_entropy(
            part.flatten(0, 1), target.flatten(), reduction="none"
        )
        (exact.view(target.shape) * weights.t()[start : start + 1024]).sum().backward()
        torch.testing.assert_close(
            losses.t()[start : start + 1024],
            exact.detach().view(target.shape),
            rtol=1e-5,
            atol=1e-4,
        )
        found = logits.grad[start : start + 1024].float()
        assert (found - part.grad).norm() <= (
            4e-3 if dtype is torch.bfloat16 else 1e-5
        ) * part.grad.norm()
    del logits, losses, found, part
    gc.collect()
    torch.cuda.empty_cache()
