"""ERNIE 4.5's router against Ernie4_5_MoeTopKRouter: which experts, with what weights, in what precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.ernie45.router import choose_experts
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.logits import prompts
from tests.helpers.ernie45_cases import MOE_NAMES, with_selection_bias

Choices = dict[int, torch.Tensor]


def _reference_choices(folder: Path, tokens: torch.Tensor) -> Choices:
    """[T, K] sorted experts of each layer, from Transformers' model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: dict[int, list[torch.Tensor]] = {}
    for layer, module in enumerate(model.model.layers):
        if hasattr(module.mlp, "gate"):
            module.mlp.gate.register_forward_hook(
                lambda _, __, output, layer=layer: found.setdefault(layer, []).append(output[1])
            )
    with torch.no_grad():
        for prompt in tokens:
            model(prompt[None], use_cache=False)
    return {layer: torch.cat(parts).sort(dim=-1).values for layer, parts in found.items()}


def _our_choices(folder: Path, layout: Layout, tokens: torch.Tensor) -> Choices:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    model = build(AutoBridge.from_hf_pretrained(folder), layout, dtype=torch.float32)
    found: dict[int, list[torch.Tensor]] = {}
    for chunk in model:
        for layer in chunk.decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_hook(
                    lambda router, __, output: found.setdefault(router.layer_number - 1, []).append(
                        output[1]
                    )
                )
    forward_logits(model, tokens)
    return {
        layer: torch.cat(parts).nonzero()[:, 1].view(sum(map(len, parts)), -1)[: tokens.numel()]
        for layer, parts in found.items()
    }


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(tp=2), Layout(ep=2)], ids=str)
@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("name", MOE_NAMES)
def test_experts_chosen(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str, std: float, layout: Layout
) -> None:
    """Identical, per token and layer; and the bias does choose: without it, other experts are."""
    folder = with_selection_bias(tiny(name), tmp_path / name, std)
    tokens = prompts(387, 2, 64)
    (reference,) = ForkLauncher(1).all(_reference_choices, folder, tokens)
    ours: Choices = {}
    for result in ForkLauncher(layout.ranks).all(_our_choices, folder, layout, tokens):
        ours |= result
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[layer], reference[layer]) for layer in reference)
    (unbiased,) = ForkLauncher(1).all(
        _reference_choices, with_selection_bias(folder, tmp_path / "unbiased", 0.0), tokens
    )
    assert any(not torch.equal(unbiased[layer], reference[layer]) for layer in reference)


def _bf16_routing(folder: Path) -> dict[str, Any]:
    """Both routers of one layer in bf16 models, on the same hidden states."""
    from megatron.bridge import AutoBridge
    from transformers import AutoModelForCausalLM

    from exaone_bridge.runtime.model import build

    reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model.layers[3].mlp.gate
    )
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, Layout())
    router = next(chunk for chunk in model).module.decoder.layers[3].mlp.router
    hidden = torch.randn(4096, 1, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        _, experts, weights = reference(hidden[:, 0])
        ours, chosen = router.eval()(hidden)
    exported = dict(bridge.export_hf_weights(model, cpu=True, show_progress=False))
    return {
        "experts": (experts.sort(dim=-1).values, chosen.nonzero()[:, 1].view(len(hidden), -1)),
        "weights": (torch.zeros(4096, 8).scatter(1, experts, weights.float()), ours),
        "types": (
            router.weight.dtype,
            router.expert_bias.dtype,
            ours.dtype,
            model[0].module.embedding.word_embeddings.weight.dtype,
        ),
        "exported": {name: weight.dtype for name, weight in exported.items()},
        "reference types": (
            reference.weight.dtype,
            reference.moe_statics.e_score_correction_bias.dtype,
        ),
    }


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("name", MOE_NAMES)
def test_bf16_model_decides_as_transformers_bf16_model(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str, std: float
) -> None:
    folder = with_selection_bias(tiny(name, dtype="bfloat16"), tmp_path / name, std)
    (found,) = ForkLauncher(1).all(_bf16_routing, folder)
    assert torch.equal(*found["experts"])
    expected, ours = found["weights"]
    assert torch.equal(
        ours.bfloat16().float(), expected
    )  # Transformers rounds the weights; the decisions are fp32
    assert found["types"] == (torch.float32, torch.float32, torch.float32, torch.bfloat16)
    assert found["reference types"] == (torch.float32, torch.float32)
    kept = {key for key, dtype in found["exported"].items() if dtype is torch.float32}
    assert kept == {
        key for key in found["exported"] if "mlp.gate.weight" in key or "moe_statics" in key
    }


def _saved_types(folder: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(target)


def test_fp32_on_disk_where_transformers_writes_fp32(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """save_pretrained of a bf16 model: the types that `HFCheckpoint.open` asks for."""
    folder = tiny("ernie45", dtype="bfloat16", num_nextn_predict_layers=0)
    ForkLauncher(1).all(_saved_types, folder, tmp_path / "saved")

    def types(path: Path) -> dict[str, str]:
        with safe_open(path / "model.safetensors", "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a dict

    assert types(tmp_path / "saved") == types(folder)


def test_arithmetic() -> None:
    """A bias large enough to choose the least likely expert does not change its weight."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, experts = choose_experts(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), 2, 1e-12)
    probabilities = logits.softmax(-1)[0]
    assert experts.tolist() == [[3, 0]]
    assert torch.allclose(weights[0], probabilities[[3, 0]] / probabilities[[3, 0]].sum())
    bounded, _ = choose_experts(logits, torch.zeros(4), 1, 0.99)
    assert torch.allclose(bounded[0, 0], probabilities[0] / 0.99)


def _after_a_step(
    folder: Path, tokens: torch.Tensor, overrides: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Router gradients and selection biases after one step's `finalize_model_grads`."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.apply_overrides_and_finalize(torch.float32, overrides)
    (model,) = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_cpu_initialization=True,
    )
    model.train()
    positions = torch.arange(tokens.shape[1] - 1)[None]
    model(
        tokens[:1, :-1].contiguous(), positions, None, labels=tokens[:1, 1:].contiguous()
    ).mean().backward()
    finalize_model_grads([model])
    router = model.module.decoder.layers[1].mlp.router
    return {"bias": router.expert_bias.clone(), "gradient": router.weight.main_grad.clone()}


@pytest.fixture(scope="module")
def balanced(megatron_bridge: Any, tiny: Any) -> Any:
    tokens = prompts(387, 1, 49)
    return lambda **overrides: ForkLauncher(1).all(
        _after_a_step, tiny("ernie45"), tokens, overrides
    )[0]


def test_nothing_balances_unless_configured(balanced: Any, tiny: Any) -> None:
    with safe_open(tiny("ernie45") / "model.safetensors", "pt") as file:
        bias = file.get_tensor("model.layers.1.mlp.moe_statics.e_score_correction_bias")[0]
    assert torch.equal(balanced()["bias"], bias)


def test_bias_update(balanced: Any) -> None:
    """Aux-loss-free balancing: each bias goes up or down by the rate; gradients are as without it."""
    plain = balanced()
    moved = balanced(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.01)
    steps = (moved["bias"] - plain["bias"]).abs()
    assert torch.allclose(steps[steps > 0], torch.tensor(0.01)) and (steps > 0).sum() >= 6
    assert torch.allclose(moved["gradient"], plain["gradient"], atol=1e-6)


def test_aux_loss(balanced: Any) -> None:
    """Changes the router's gradient, not the selection bias."""
    plain = balanced()
    pulled = balanced(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1)
    assert torch.equal(pulled["bias"], plain["bias"])
    assert (pulled["gradient"] - plain["gradient"]).norm() > 0.01 * plain["gradient"].norm()


def test_never_both(balanced: Any) -> None:
    with pytest.raises(UnsupportedConfig, match="one way or the other"):
        balanced(
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.1,
        )
