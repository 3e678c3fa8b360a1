"""Adapters made by PEFT, loaded into Megatron-Core at any layout, trained on and exported again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.errors import UnmappedTensors, UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.adapters import hf_logits, hf_model, save_adapter

TOLERANCE = 1e-4
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ALL[:4]


def _make(folder: Path, target: Path, modules: list[str], fields: dict[str, Any]) -> None:
    """In a process: an adapter of PEFT with random values."""
    from peft import LoraConfig, get_peft_model

    text_only = r".*layers\.\d+\.(self_attn|mlp)\.(" + "|".join(modules) + ")"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=text_only, **fields)
    model = get_peft_model(hf_model(folder), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(target)


def _go_on(folder: Path, layout: Layout, adapter: Path, work: Path) -> tuple[Any, Any, str]:
    """On a rank: logits with the loaded adapter, a step of all its parameters, logits after it."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.peft_loading import lora_from_peft
    from exaone_bridge.runtime.model import build, forward_logits

    tokens = random_prompts(387, 2, 40)
    peft = lora_from_peft(adapter)
    model = peft(build(AutoBridge.from_hf_pretrained(folder), layout))
    before = forward_logits(model, tokens)
    trained = [p for chunk in model for p in chunk.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(1.5)
    after = forward_logits(model, tokens)
    save_adapter(model, peft, work / "run")
    return before, after, type(peft).__name__


CASES = {
    "exaone4": ("exaone4", Layout(), ALL, {}),
    "TP2": ("exaone4", Layout(tp=2, sp=True), ["q_proj", "v_proj", "up_proj", "down_proj"], {}),
    "PP2": ("exaone4", Layout(pp=2), ALL, {"use_rslora": True}),
    "ERNIE, EP2": ("ernie45", Layout(ep=2), ATTENTION, {}),
    "EXAONE 4.5, TP2": ("exaone45", Layout(tp=2), ALL, {}),
    "K-EXAONE, EP2": ("exaone-moe", Layout(ep=2), ATTENTION, {}),
    "K-EXAONE, PP2": ("exaone-moe", Layout(pp=2), ["q_proj", "v_proj"], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_adapter_is_loaded_trained_and_exported(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, case: str
) -> None:
    """Before and after a change of all its trained parameters, its logits are those of PEFT."""
    name, layout, modules, fields = CASES[case]
    folder = tiny(name, **({"num_nextn_predict_layers": 0} if name == "ernie45" else {}))
    adapter, tokens = tmp_path / "adapter", random_prompts(387, 2, 40)
    ForkLauncher(1).all(_make, folder, adapter, modules, fields)
    base = ForkLauncher(1).first(hf_logits, folder, tokens)
    in_peft = ForkLauncher(1).first(hf_logits, folder, tokens, adapter)
    results = ForkLauncher(layout.ranks).all(_go_on, folder, layout, adapter, tmp_path)
    export_checkpoint(folder, tmp_path / "exported", adapter=tmp_path / "run", peft=True)
    again = ForkLauncher(1).first(hf_logits, folder, tokens, tmp_path / "exported")
    assert (in_peft - base).abs().max() > 0.1
    for before, after, scheme in results:
        assert scheme == "LoadedCanonicalLoRA"
        if before is not None:
            assert (before - in_peft).abs().max() <= TOLERANCE
            assert (after - before).abs().max() > 0.1
            assert (after - again).abs().max() <= TOLERANCE


def _load_error(folder: Path, adapter: Path) -> str:
    """On a rank: the error of an adapter of another model."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.bridge.peft_loading import lora_from_peft
    from exaone_bridge.runtime.model import build

    with pytest.raises(UnmappedTensors) as caught:
        lora_from_peft(adapter)(build(AutoBridge.from_hf_pretrained(folder), Layout()))
    return str(caught.value)


def test_other_adapters_are_rejected(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    from exaone_bridge.bridge.peft_loading import lora_from_peft

    adapter = tmp_path / "adapter"
    ForkLauncher(1).all(_make, tiny("exaone4"), adapter, ["q_proj", "down_proj"], {})
    other = tiny("exaone4", hidden_size=32)
    assert "fit no linear of the model" in ForkLauncher(1).first(_load_error, other, adapter)
    experts = ForkLauncher(1).first(_load_error, tiny("exaone-moe"), adapter)
    assert "(of a model with experts, attention's)" in experts
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for field, value in (("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("bias", "all")):
        path.write_text(json.dumps({**config, field: value}))
        with pytest.raises(UnsupportedConfig, match=f"{field} is .*merge the adapter in PEFT"):
            lora_from_peft(adapter)
    path.write_text(json.dumps(config))
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, weights)
    with pytest.raises(UnmappedTensors, match=r"q_proj\.lora_B\.weight"):
        lora_from_peft(adapter)
