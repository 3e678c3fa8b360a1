"""The router of ERNIE 4.5 against Ernie4_5_MoeTopKRouter: experts, their weights, data types."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.ernie45.router import choose_experts
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.balancing import after_one_step
from tests.helpers.layouts import slow

Experts = dict[int, torch.Tensor]  # 0-based layer -> [T, K] experts of each token, sorted


def with_selection_bias(folder: Path, target: Path, std: float) -> Path:
    """Copy a model and scale its selection biases, whose standard deviation is 0.02, to `std`."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.mul_(std / 0.02)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _hf_experts(folder: Path, tokens: torch.Tensor) -> Experts:
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


def _megatron_experts(folder: Path, layout: Layout, tokens: torch.Tensor) -> Experts:
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


@pytest.mark.parametrize(
    "layout", [Layout(), *slow(Layout(pp=2), Layout(tp=2)), Layout(ep=2)], ids=str
)
@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("name", ["ernie45", "ernie45-300b"])
def test_experts_of_each_token_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str, std: float, layout: Layout
) -> None:
    """The selection bias has an effect: without it, Transformers chooses other experts."""
    folder = with_selection_bias(tiny(name), tmp_path / name, std)
    tokens = random_prompts(387, 2, 64)
    reference = ForkLauncher().first(_hf_experts, folder, tokens)
    megatron: Experts = {}
    for result in ForkLauncher(layout.ranks).all(_megatron_experts, folder, layout, tokens):
        megatron |= result
    assert megatron.keys() == reference.keys()
    assert all(torch.equal(megatron[layer], reference[layer]) for layer in reference)
    without_bias = with_selection_bias(folder, tmp_path / "unbiased", 0.0)
    unbiased = ForkLauncher().first(_hf_experts, without_bias, tokens)
    assert any(not torch.equal(unbiased[layer], reference[layer]) for layer in reference)


def _bf16_routing(folder: Path) -> dict[str, Any]:
    """Run both routers of layer 3, of bf16 models, on the same hidden states [T, 1, H].

    Returns:
        Pairs of Transformers and Megatron-Core: "experts" [T, K], "weights" [T, E]; data types.
    """
    from megatron.bridge import AutoBridge
    from transformers import AutoModelForCausalLM

    from exaone_bridge.runtime.model import build

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    reference = hf.model.layers[3].mlp.gate
    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, Layout())
    router = model[0].module.decoder.layers[3].mlp.router
    hidden = torch.randn(4096, 1, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        _, experts, weights = reference(hidden[:, 0])
        megatron_weights, chosen = router.eval()(hidden)
    exported = dict(bridge.export_hf_weights(model, cpu=True, show_progress=False))
    return {
        "experts": (experts.sort(dim=-1).values, chosen.nonzero()[:, 1].view(len(hidden), -1)),
        "weights": (torch.zeros(4096, 8).scatter(1, experts, weights.float()), megatron_weights),
        "types": (
            router.weight.dtype,
            router.expert_bias.dtype,
            megatron_weights.dtype,
            model[0].module.embedding.word_embeddings.weight.dtype,
        ),
        "exported": {name: weight.dtype for name, weight in exported.items()},
        "reference types": (
            reference.weight.dtype,
            reference.moe_statics.e_score_correction_bias.dtype,
        ),
    }


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("name", ["ernie45", "ernie45-300b"])
def test_experts_of_a_bf16_model_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, name: str, std: float
) -> None:
    folder = with_selection_bias(tiny(name, dtype="bfloat16"), tmp_path / name, std)
    found = ForkLauncher().first(_bf16_routing, folder)
    assert torch.equal(*found["experts"])
    expected, weights = found["weights"]
    # Both choose in fp32; only Transformers then rounds the weights.
    assert torch.equal(weights.bfloat16().float(), expected)
    assert found["types"] == (torch.float32, torch.float32, torch.float32, torch.bfloat16)
    assert found["reference types"] == (torch.float32, torch.float32)
    fp32 = {key for key, dtype in found["exported"].items() if dtype is torch.float32}
    assert fp32 == {
        key for key in found["exported"] if "mlp.gate.weight" in key or "moe_statics" in key
    }


def _save_as_bf16(folder: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(target)


def test_data_types_on_disk_equal_those_that_transformers_saves(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """`save_pretrained` of a bf16 model keeps the router in fp32."""
    folder = tiny("ernie45", dtype="bfloat16", num_nextn_predict_layers=0)
    ForkLauncher().first(_save_as_bf16, folder, tmp_path / "saved")

    def types(path: Path) -> dict[str, str]:
        with safe_open(path / "model.safetensors", "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

    assert types(tmp_path / "saved") == types(folder)


def test_choose_experts_weighs_without_the_selection_bias() -> None:
    """The selection bias chooses the least likely expert, and does not change its weight."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, experts = choose_experts(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), 2, 1e-12)
    probabilities = logits.softmax(-1)[0]
    assert experts.tolist() == [[3, 0]]
    assert torch.allclose(weights[0], probabilities[[3, 0]] / probabilities[[3, 0]].sum())
    bounded, _ = choose_experts(logits, torch.zeros(4), 1, 0.99)
    assert torch.allclose(bounded[0, 0], probabilities[0] / 0.99)


@pytest.fixture(scope="module")
def one_step(megatron_bridge: Any, tiny: Any) -> Any:
    tokens = random_prompts(387, 1, 49)
    return lambda **overrides: ForkLauncher().first(
        after_one_step, tiny("ernie45"), tokens, overrides
    )


def test_selection_bias_stays_without_balancing(one_step: Any, tiny: Any) -> None:
    with safe_open(tiny("ernie45") / "model.safetensors", "pt") as file:
        bias = file.get_tensor("model.layers.1.mlp.moe_statics.e_score_correction_bias")[0]
    assert torch.equal(one_step()["bias"], bias)


def test_selection_bias_moves_by_the_update_rate(one_step: Any) -> None:
    """Balancing without an auxiliary loss leaves the gradients as they are."""
    plain = one_step()
    moved = one_step(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.01)
    steps = (moved["bias"] - plain["bias"]).abs()
    assert torch.allclose(steps[steps > 0], torch.tensor(0.01)) and (steps > 0).sum() >= 6
    assert torch.allclose(moved["gradient"], plain["gradient"], atol=1e-6)


def test_auxiliary_loss_changes_the_gradient_only(one_step: Any) -> None:
    plain = one_step()
    balanced = one_step(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1)
    assert torch.equal(balanced["bias"], plain["bias"])
    assert (balanced["gradient"] - plain["gradient"]).norm() > 0.01 * plain["gradient"].norm()


def test_both_kinds_of_balancing_are_rejected(one_step: Any) -> None:
    with pytest.raises(UnsupportedConfig, match="one way or the other"):
        one_step(
            moe_router_enable_expert_bias=True,
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.1,
        )


def test_router_replay_is_rejected(one_step: Any) -> None:
    with pytest.raises(UnsupportedConfig, match="moe_enable_routing_replay"):
        one_step(moe_enable_routing_replay=True)
