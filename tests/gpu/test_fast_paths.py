"""The faster kernels are as exact as the code they replace: attention, experts, cross entropy."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers import kernel_formulas
from tests.helpers.gpu import wide


def _model(folder: Any, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Any:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(), dtype=dtype, **overrides)
    return model


def _experts(model: Any) -> list[Any]:
    from exaone_bridge.modules.grouped_experts import GroupedExperts

    return [module for module in model.modules() if isinstance(module, GroupedExperts)]


def test_kernels_equal_plain_torch(nccl: None) -> None:
    with torch.device("cuda"):
        kernel_formulas.check_all()


@pytest.mark.parametrize("name", ["exaone4", "exaone4-1.2b", "ernie45-dense"])
def test_fused_attention_is_as_exact_as_unfused_attention(
    nccl: None, tiny: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare bf16 gradients with and without the kernel to fp32; both RoPEs, and no RoPE."""
    from exaone_bridge.modules import fused_attention

    calls = []
    kernel = fused_attention.qk_norm_rope
    monkeypatch.setattr(
        fused_attention, "qk_norm_rope", lambda *args: (calls.append(args), kernel(*args))[1]
    )
    generator = torch.Generator("cuda").manual_seed(6)
    tokens = torch.randint(512, (2, 301), device="cuda", generator=generator)
    positions = torch.arange(300, device="cuda").expand(2, -1)
    folder = tiny(name, **wide(name, "bfloat16"))

    def gradients(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], int]:
        model = _model(folder, dtype=dtype).train()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        model(inputs, positions, None, labels=labels).float().mean().backward()
        config = (model if dtype is torch.float32 else model.module).config
        return {
            name.removeprefix("module."): parameter.grad.float()
            for name, parameter in model.named_parameters()
        }, config.num_layers

    fused, layers = gradients(torch.bfloat16)
    assert len(calls) == layers
    assert sum(args[4] is None for args in calls) == (layers // 4 if name == "exaone4" else 0)
    monkeypatch.setattr(fused_attention.FusedSelfAttention, "_kernel_supports", lambda *_: False)
    (unfused, _), (reference, _) = gradients(torch.bfloat16), gradients(torch.float32)
    assert len(calls) == layers
    distances = {
        name: ((gradient - reference[name]).norm(), (unfused[name] - reference[name]).norm())
        for name, gradient in fused.items()
    }
    # One norm has 64 gradients, too few for the strict bound; all norms together are within it.
    for name, (with_kernel, without) in distances.items():
        bound = max(2 * without, 1e-3 * reference[name].norm())
        assert with_kernel <= bound, (name, with_kernel, without)
        if "layernorm" not in name:
            assert with_kernel <= 1.2 * without, (name, with_kernel, without)
    norms = [pair for name, pair in distances.items() if "layernorm" in name]
    bound = 1.2**2 * sum(without**2 for _, without in norms)
    assert sum(with_kernel**2 for with_kernel, _ in norms) <= bound


@pytest.mark.parametrize("counts", [[64, 0, 200, 8], [0, 0, 272, 0], [0, 1, 3, 0]])
def test_grouped_experts_equal_single_experts(nccl: None, tiny: Any, counts: list[int]) -> None:
    """Compare output and gradients to fp32 experts; some experts have no token."""
    experts = _experts(_model(tiny("ernie45", **wide("ernie45", "bfloat16"))))[0]
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
    outputs = []
    for index, (tokens, scale) in enumerate(
        zip(exact[0].split(counts), exact[1].split(counts), strict=True)
    ):
        gate, up = (tokens @ weights[f"linear_fc1.weight{index}"].t()).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up * scale[:, None]
        outputs.append(hidden @ weights[f"linear_fc2.weight{index}"].t())
    torch.cat(outputs).backward(upstream.float())

    def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool((found.float() - expected).norm() <= 0.01 * expected.norm())

    assert close(y, torch.cat(outputs))
    assert close(x.grad, exact[0].grad)
    assert close(probabilities.grad, exact[1].grad)
    for name in names:
        assert close(experts.get_parameter(name).grad, weights[name].grad), name


def test_grouped_experts_do_not_synchronise(
    nccl: None, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer copies nothing to the CPU, and has the gradients of Transformer Engine's layer."""
    from exaone_bridge.modules import grouped_experts

    model = _model(tiny("ernie45", **wide("ernie45", "bfloat16"))).train()
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
    gradients()  # compiles kernels, which synchronises
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 4
    monkeypatch.setattr(grouped_experts.GroupedExperts, "_supports_grouped_mm", lambda *_: False)
    expected = gradients()
    assert len(calls) == 4
    for found, gradient in zip(grouped, expected, strict=True):
        assert (found is None) == (gradient is None)
        if found is not None:
            difference = (found.float() - gradient.float()).norm()
            assert difference <= 0.01 * gradient.float().norm()


def test_expert_weights_are_contiguous_in_the_optimizer_buffers(nccl: None, tiny: Any) -> None:
    """Otherwise every step would copy the weights of all experts twice."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig

    from exaone_bridge.modules.grouped_experts import stack_weights

    provider = AutoBridge.from_hf_pretrained(
        tiny("ernie45", **wide("ernie45", "bfloat16"))
    ).to_megatron_provider(load_weights=False)
    provider.apply_overrides_and_finalize(torch.bfloat16, {})
    model = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=True)
    )
    assert _experts(model[0])
    for experts in _experts(model[0]):
        for linear in (experts.linear_fc1, experts.linear_fc2):
            assert stack_weights(linear._weights()).data_ptr() == linear.weight0.data_ptr()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((300, 3, 512), torch.float32),
        ((300, 3, 512), torch.bfloat16),
        ((32768, 1, 102400), torch.bfloat16),  # more elements than 32 bits can index
    ],
)
def test_fused_cross_entropy_equals_that_of_torch(
    nccl: None, tiny: Any, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Compare losses and gradients of Transformer Engine's function to torch's in fp32."""
    model = _model(tiny("exaone4", **wide("exaone4", "bfloat16")))
    assert model.module.config.cross_entropy_fusion_impl == "te"
    length, batch, vocab_size = shape
    generator = torch.Generator("cuda").manual_seed(5)
    logits = torch.randn(shape, device="cuda", dtype=dtype, generator=generator).mul_(3)
    logits[..., -7:] = torch.finfo(dtype).min  # as logits of the vocabulary padding
    logits.requires_grad_()
    labels = torch.randint(vocab_size - 7, (batch, length), device="cuda", generator=generator)
    weights = torch.rand(batch, length, device="cuda", generator=generator)
    weights[:, :5] = 0.0
    losses = model.module.compute_language_model_loss(labels, logits)
    (losses * weights).sum().backward()

    for start in range(0, length, 1024):
        chunk = slice(start, start + 1024)
        part, target = logits.detach()[chunk].float().requires_grad_(), labels.t()[chunk]
        expected = torch.nn.functional.cross_entropy(
            part.flatten(0, 1), target.flatten(), reduction="none"
        ).view(target.shape)
        (expected * weights.t()[chunk]).sum().backward()
        found = losses.t()[chunk]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-4)
        gradient = logits.grad[chunk].float()
        tolerance = 4e-3 if dtype is torch.bfloat16 else 1e-5
        assert (gradient - part.grad).norm() <= tolerance * part.grad.norm()
    del logits, losses, found, gradient, part
    gc.collect()
    torch.cuda.empty_cache()
