"""Adapters on post-norm linears, with Megatron-Bridge's own LoRA and DoRA classes, unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.adapters import hf_logits

TOLERANCE = 1e-4


def _adapted(
    folder: Path,
    layout: Layout,
    kind: str,
    targets: list[str],
    tokens: torch.Tensor,
    output: Path,
    std: float = 0.3,
) -> dict[str, Any]:
    """On a rank: compute logits without, with, and with disabled adapters; export both ways."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout)
    found: dict[str, Any] = {"base": forward_logits(model, tokens)}
    peft = {"lora": LoRA, "dora": DoRA}[kind](dim=4, alpha=8, target_modules=targets)
    model = peft(model, training=False)
    torch.manual_seed(
        7
    )  # the same numbers on every rank: replicated halves of an adapter stay replicated
    with torch.no_grad():
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if ".adapter.linear_out" in name:
                    parameter.normal_(std=std)
                elif name.endswith(".adapter.weight_magnitude"):
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    found["adapted"] = forward_logits(model, tokens)
    bridge.save_hf_pretrained(model, output / "merged", show_progress=False)
    try:
        bridge.save_hf_adapter(model, output / "adapter", peft, str(folder), show_progress=False)
    except UnsupportedConfig as error:
        found["error"] = str(error)
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, AdapterWrapper):
                module.disable_adapter_layers()
    found["disabled"] = forward_logits(model, tokens)
    return found


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
@pytest.mark.parametrize("target", ["linear_proj", "linear_fc2", "linear_qkv", "linear_fc1"])
def test_lora_as_trained_is_lora_as_exported(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, target: str, layout: Layout
) -> None:
    """Logits with adapters, of the merged export and of the adapter in PEFT are equal."""
    folder = tiny("exaone4")
    tokens = random_prompts(387, 2, 40)
    results = ForkLauncher(layout.ranks).all(
        _adapted, folder, layout, "lora", [target], tokens, tmp_path
    )
    (merged,) = ForkLauncher(1).all(hf_logits, tmp_path / "merged", tokens)
    (in_peft,) = ForkLauncher(1).all(hf_logits, folder, tokens, tmp_path / "adapter")
    for result in results:
        assert (result["adapted"] - result["base"]).abs().max() > 0.1  # the adapters do something
        assert (result["adapted"] - merged).abs().max() <= TOLERANCE
        assert (result["adapted"] - in_peft).abs().max() <= TOLERANCE
        assert (result["disabled"] - result["base"]).abs().max() <= 1e-5


@pytest.mark.parametrize("target", ["linear_proj", "linear_fc2"])
def test_unpatched_order_of_norm_and_adapter_fails(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Megatron-Bridge 0.6.2 adds the adapter after the norm: the merged export differs."""
    from megatron.bridge.peft.adapter_wrapper import AdapterWrapper

    monkeypatch.setattr(AdapterWrapper, "__init__", AdapterWrapper.__init__.__wrapped__)
    folder = tiny("exaone4")
    tokens = random_prompts(387, 2, 40)
    (result,) = ForkLauncher(1).all(_adapted, folder, Layout(), "lora", [target], tokens, tmp_path)
    (merged,) = ForkLauncher(1).all(hf_logits, tmp_path / "merged", tokens)
    difference = (result["adapted"] - merged).abs().max()
    assert (
        not difference <= 100 * TOLERANCE
    )  # not a number where the unnormalised outputs have grown too large


ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def _again(folder: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    """On a rank: the logits of a folder, in Megatron-Core."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    return forward_logits(build(AutoBridge.from_hf_pretrained(folder), Layout()), tokens)


def _assert_one_model(
    folder: Path, layout: Layout, kind: str, targets: list[str], work: Path, in_peft: bool = True
) -> None:
    """Assert equal logits with adapters, merged in Megatron-Core and Transformers, and in PEFT."""
    tokens = random_prompts(387, 2, 40)
    results = ForkLauncher(layout.ranks).all(
        _adapted, folder, layout, kind, targets, tokens, work, 0.1
    )
    others = {
        "merged, Transformers": ForkLauncher(1).all(hf_logits, work / "merged", tokens)[0],
        "merged, Megatron-Core": ForkLauncher(1).all(_again, work / "merged", tokens)[0],
    }
    if in_peft:
        others["adapter, PEFT"] = ForkLauncher(1).all(hf_logits, folder, tokens, work / "adapter")[
            0
        ]
    for result in (result for result in results if result["adapted"] is not None):
        assert (result["adapted"] - result["base"]).abs().max() > 0.1  # the adapters do something
        assert (result["disabled"] - result["base"]).abs().max() <= 1e-5
        assert ("error" in result) != in_peft
        for name, logits in others.items():
            assert (result["adapted"] - logits).abs().max() <= TOLERANCE, name


@pytest.mark.parametrize("layout", [Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_dora_as_trained_is_dora_as_exported(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, layout: Layout
) -> None:
    """All four linears; magnitudes away from where they start."""
    _assert_one_model(tiny("exaone4"), layout, "dora", ALL, tmp_path)
    vectors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith("lora_magnitude_vector") for name in vectors) == 8 * 7


@pytest.mark.parametrize(
    ("kind", "layout"), [("lora", Layout()), ("dora", Layout(tp=2, sp=True))], ids=str
)
def test_pre_norm_linears(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, kind: str, layout: Layout
) -> None:
    """The adapter of dense ERNIE 4.5 takes the normalised input, as with Transformer Engine."""
    _assert_one_model(tiny("ernie45-dense"), layout, kind, ALL, tmp_path)


ATTENTION = ["linear_qkv", "linear_proj"]
EXPERTS = ["*.experts.*linear_fc1", "*.experts.*linear_fc2"]


def test_attention_of_a_mixture_of_experts(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    _assert_one_model(
        tiny("ernie45", num_nextn_predict_layers=0), Layout(), "dora", ATTENTION, tmp_path
    )


@pytest.mark.parametrize(
    ("targets", "layout"),
    [(["linear_fc1", "linear_fc2"], Layout()), (EXPERTS, Layout(ep=2))],
    ids=["all", "routed-ep2"],
)
def test_mlp_of_a_mixture_of_experts(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, targets: list[str], layout: Layout
) -> None:
    """The merged export works; that of the adapter raises, because PEFT would misread it."""
    _assert_one_model(
        tiny("ernie45", num_nextn_predict_layers=0),
        layout,
        "lora",
        targets,
        tmp_path,
        in_peft=False,
    )


def _dora_faults(folder: Path) -> tuple[str, str, bool]:
    """On a rank: return the errors of inexact DoRA, and whether a magnitude is sharded."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.dora import DoRA

    from exaone_bridge.runtime.model import build

    messages = []
    bridge = AutoBridge.from_hf_pretrained(folder)
    for options in (
        {"target_modules": EXPERTS},
        {"target_modules": ["linear_qkv"], "dropout": 0.1},
    ):
        with pytest.raises(UnsupportedConfig) as caught:
            DoRA(**options)(build(bridge, Layout()))
        messages.append(str(caught.value))
    model = DoRA(target_modules=["linear_qkv"])(build(bridge, Layout()))
    magnitude = model[0].decoder.layers[0].self_attention.linear_qkv.adapter.weight_magnitude
    return messages[0], messages[1], magnitude.tensor_model_parallel


def test_inexact_dora_is_rejected(megatron_bridge: Any, tiny: Any) -> None:
    ((experts, dropout, marked),) = ForkLauncher(1).all(
        _dora_faults, tiny("ernie45", num_nextn_predict_layers=0)
    )
    assert "routed experts" in experts and "use LoRA for experts" in experts
    assert "dropout is 0.1" in dropout and "set dropout=0.0" in dropout
    assert marked


@pytest.mark.parametrize("fault", ["norm", "merge"])
def test_unpatched_dora_fails(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Megatron-Bridge 0.6.2 takes the norm of a rank's shard, and exports no magnitudes."""
    from megatron.bridge.models.conversion.peft_bridge import MegatronPeftBridge
    from megatron.bridge.peft.dora_layers import DoRALinear

    from exaone_bridge.bridge.dora_export import DoRAExport

    if fault == "norm":
        monkeypatch.setattr(DoRALinear, "_get_weight_norm", DoRALinear._get_weight_norm.__wrapped__)
    else:
        own_merge = MegatronPeftBridge._merge_lora_adapter_weights
        monkeypatch.setattr(DoRAExport, "_merge_lora_adapter_weights", own_merge)
    with pytest.raises(AssertionError, match="merged, Transformers"):
        _assert_one_model(tiny("exaone4"), Layout(tp=2), "dora", ["linear_proj"], tmp_path)
