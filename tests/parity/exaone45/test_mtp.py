"""Multi-token prediction of EXAONE 4.5: logits, losses and gradients against the formula, round trips, layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.convert.convert import export_checkpoint
from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_configs
from tests.helpers.exaone45_cases import changed
from tests.helpers.exaone45_mtp import formula, ours, prompts_of
from tests.helpers.training import relative_difference


def _compare(
    folder: Path, layout: Layout, depth: int, overrides: dict[str, Any], rule: int = 0
) -> float:
    """The worst difference of logits; everything else is asserted."""
    (expected,) = ForkLauncher(1).all(
        formula, folder, prompts_of(), depth, rule, torch.float32, layout.cp
    )
    results = ForkLauncher(layout.ranks).all(ours, folder, layout, prompts_of(), depth, overrides)
    last = [result for result in results if result.logits]
    assert last
    worst = max(
        (mine - theirs)[:, : -1 - number].abs().max().item()  # the last positions have no next word
        for result in last
        for number, (mine, theirs) in enumerate(zip(result.logits, expected.logits, strict=True))
    )
    for result in results:
        assert not result.differing
        if worst <= 1e-4:
            assert all(
                abs(mine - theirs) <= 1e-4
                for mine, theirs in zip(result.losses, expected.losses, strict=bool(result.logits))
            )
            found, gradients = result.gradients, expected.gradients
            assert {
                name
                for name in gradients
                if relative_difference(found[name], gradients[name]) > 1e-4
            } == set()
            assert all(gradients[name].any() for name in found if name.startswith("mtp."))
    return worst


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, sp=True), Layout(tp=2, pp=2), Layout(cp=2), Layout(pp=2, vpp=2)],
    ids=str,
)
def test_logits_loss_and_gradients(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    assert _compare(tiny("exaone45"), layout, 1, {}) <= 1e-4


@pytest.mark.parametrize("shared", [True, False])
def test_two_words_further(megatron_bridge: Any, tiny: Any, shared: bool) -> None:
    fields = changed(text_config__num_nextn_predict_layers=2, text_config__mtp_share_layers=shared)
    if shared:
        assert _compare(tiny("exaone45", **fields), Layout(), 2, {}) <= 1e-4
    else:  # `mtp.fc` and the norms are one on disk, and Megatron-Core has them once a layer
        with pytest.raises(UnsupportedConfig, match="mtp_share_layers"):
            ForkLauncher(1).all(ours, tiny("exaone45", **fields), Layout(), prompts_of(), 2, {})


def test_another_rule(megatron_bridge: Any, tiny: Any) -> None:
    """All positions and no RoPE, like a global layer of the decoder."""
    other = {"mtp_windowed": False, "mtp_use_rope": False}
    assert _compare(tiny("exaone45"), Layout(), 1, other, rule=3) <= 1e-4


def _train_and_save(folder: Path, target: Path, layout: Layout, mtp: int | None) -> None:
    """Change every parameter, and save."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout, mtp_num_layers=mtp)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.add_(1.0)
    bridge.save_megatron_model(model, target)


def _export_through_autobridge(source: Path, megatron: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    model = load_megatron(bridge, megatron, Layout())
    assert model[0].config.mtp_num_layers == 1
    bridge.save_hf_pretrained(model, target, show_progress=False)


def test_what_was_trained_is_exported(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    """From a checkpoint with multi-token prediction built, by the command line's way and by AutoBridge's."""
    source = tiny("exaone45")
    ForkLauncher(4).all(_train_and_save, source, tmp_path / "megatron", Layout(tp=2, pp=2), 1)
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    ForkLauncher(1).all(
        _export_through_autobridge, source, tmp_path / "megatron", tmp_path / "autobridge"
    )
    before = load_file(source / "model.safetensors")
    for folder in (tmp_path / "exported", tmp_path / "autobridge"):
        after = load_file(folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value + 1.0) for name, value in before.items())
        assert compare_configs(
            read_json(source / "config.json"), read_json(folder / "config.json")
        ).passed


def test_what_was_not_built_is_carried(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    source = tiny("exaone45")
    ForkLauncher(1).all(_train_and_save, source, tmp_path / "megatron", Layout(), None)
    with pytest.raises(CheckpointError, match="travel beside the model"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    export_checkpoint(tmp_path / "megatron", tmp_path / "dropped", drop_passthrough=True)
    assert not any(
        name.startswith("mtp.") for name in load_file(tmp_path / "dropped/model.safetensors")
    )
    text = read_json(tmp_path / "dropped/config.json")["text_config"]
    assert text["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("frozen", ["freeze_mtp_model", "freeze_language_model"])
def test_frozen(megatron_bridge: Any, tiny: Any, frozen: str) -> None:
    """Each is frozen alone; the other learns."""
    (found,) = ForkLauncher(1).all(
        ours, tiny("exaone45"), Layout(), prompts_of(), 1, {frozen: True}
    )
    moved = {
        name.startswith("mtp.")
        for name, value in found.gradients.items()
        if value.any() and ".visual." not in name
    }
    assert moved == {frozen == "freeze_language_model"}


def _swapped(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    right = MultiTokenPredictionLayer._concat_embeddings
    patch.setattr(
        MultiTokenPredictionLayer, "_concat_embeddings", lambda self, a, b: right(self, b, a)
    )
    return {}


FAULTS = {
    "hidden state before embedding": _swapped,
    "no RoPE": lambda patch: {"mtp_use_rope": False},
    "no window": lambda patch: {"mtp_windowed": False},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    assert _compare(tiny("exaone45"), Layout(), 1, FAULTS[fault](monkeypatch)) > 1e-3
