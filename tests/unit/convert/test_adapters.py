"""`export --adapter`: adapter checkpoints of Megatron-Bridge, merged or in PEFT's format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from exaone_bridge.cli import main
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.errors import CheckpointError, UnmappedTensors, UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.adapters import ATTENTION, hf_logits, make_peft, randomize, save_adapter

TOLERANCE = 1e-4


def _train(
    folder: Path, layout: Layout, scheme: str, targets: list[str] | None, work: Path
) -> torch.Tensor | None:
    """On a rank: save an adapter with random values, and Megatron-Bridge's merged export of it."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    peft = make_peft(scheme, targets)
    model = peft(build(bridge, layout), training=True)
    randomize(model)
    save_adapter(model, peft, work / "run")
    bridge.save_hf_pretrained(model, work / "merged by AutoBridge", show_progress=False)
    return forward_logits(model, random_prompts(387, 2, 40))


CASES = {
    "LoRA": ("exaone4", Layout(), "LoRA", None, True),
    "LoRA, TP2": ("exaone4", Layout(tp=2, sp=True), "LoRA", None, True),
    "DoRA, TP2": ("exaone4", Layout(tp=2), "DoRA", None, True),
    "CanonicalLoRA, TP2": ("exaone4", Layout(tp=2), "CanonicalLoRA", None, True),
    "routed experts, PP2": ("ernie45", Layout(pp=2), "LoRA", None, False),
    "routed experts, EP2": ("exaone-moe", Layout(ep=2), "LoRA", None, False),
    "attention, EP2": ("exaone-moe", Layout(ep=2), "LoRA", ATTENTION, True),
    "vision encoder": ("exaone45", Layout(tp=2), "LoRA", None, True),
}


@pytest.mark.parametrize("case", CASES)
def test_exported_adapter_is_the_trained_one(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, case: str
) -> None:
    """Merged into either base, and in PEFT: the logits of Megatron-Core with the adapter."""
    name, layout, scheme, targets, in_peft = CASES[case]
    folder = tiny(name, **({"num_nextn_predict_layers": 0} if name == "ernie45" else {}))
    results = ForkLauncher(layout.ranks).all(_train, folder, layout, scheme, targets, tmp_path)
    run = tmp_path / "run"
    import_checkpoint(folder, tmp_path / "base")
    export_checkpoint(tmp_path / "base", tmp_path / "merged", adapter=run)
    export_checkpoint(folder, tmp_path / "merged too", adapter=run, workers=2)
    merged, too, theirs = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("merged", "merged too", "merged by AutoBridge")
    )
    assert merged.keys() == too.keys() == theirs.keys()
    for key, value in merged.items():
        assert torch.equal(value, too[key])
        assert (value - theirs[key]).abs().max() <= 1e-6, key
    tokens = random_prompts(387, 2, 40)
    others = [ForkLauncher(1).first(hf_logits, tmp_path / "merged", tokens)]
    if in_peft:
        export_checkpoint(folder, tmp_path / "peft", adapter=run, peft=True)
        others.append(ForkLauncher(1).first(hf_logits, folder, tokens, tmp_path / "peft"))
    else:
        with pytest.raises(UnsupportedConfig, match=r"export merged weights \(without --peft\)"):
            export_checkpoint(folder, tmp_path / "peft", adapter=run, peft=True)
    base = ForkLauncher(1).first(hf_logits, folder, tokens)
    adapted = next(result for result in results if result is not None)
    assert (adapted - base).abs().max() > 0.1
    for logits in others:
        assert (adapted - logits).abs().max() <= TOLERANCE


def _other_scheme(run: Path) -> None:
    path = run / "iter_0000003" / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["peft"]["_target_"] = "megatron.bridge.peft.other.VeRA"
    path.write_text(yaml.safe_dump(config))


def test_rejected_adapters(
    megatron_bridge: Any,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command writes an adapter in PEFT's format; what is no adapter of the model is named."""
    folder, run = tiny("exaone4"), tmp_path / "run"
    ForkLauncher(1).all(_train, folder, Layout(), "LoRA", ["linear_fc2"], tmp_path)
    dense = tiny("exaone4", num_hidden_layers=4, layer_types=["full_attention"] * 4)
    output, peft = tmp_path / "output", tmp_path / "peft"
    import_checkpoint(folder, tmp_path / "base")
    monkeypatch.setattr("sys.argv", ["exaone-bridge", "export", f"{folder}", f"{peft}"])
    sys.argv += ["--adapter", str(run), "--peft"]
    with pytest.raises(SystemExit, match="0"):
        main()
    names = sorted(path.name for path in peft.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    for base, adapter, message in (
        (folder, tmp_path / "base", "not an adapter checkpoint .* training run with LoRA or DoRA"),
        (folder, peft, "adapter in PEFT's format"),
        (folder, folder, "not a Megatron-Bridge checkpoint"),
        (dense, run, "has shape .* check that the adapter was trained on this model"),
        (tiny("exaone-moe"), run, "is an adapter of exaone4, and the model is exaone_moe; check"),
    ):
        with pytest.raises((CheckpointError, UnmappedTensors), match=message):
            export_checkpoint(base, output, adapter=adapter)
    for command in ("export", "inspect", "perplexity", "generate"):  # the adapter as a model
        files = {"export": [output], "perplexity": ["--text", __file__], "generate": ["--prompt=a"]}
        monkeypatch.setattr("sys.argv", ["exaone-bridge", command, str(run)])
        sys.argv += map(str, files.get(command, []))
        with pytest.raises(SystemExit, match="2"):
            main()
        assert f"export MODEL MERGED --adapter {run}" in capsys.readouterr().err
    _other_scheme(run)
    with pytest.raises(UnsupportedConfig, match="peft is 'VeRA', and must be one of 'LoRA'"):
        export_checkpoint(folder, output, adapter=run)
    assert not output.exists()
