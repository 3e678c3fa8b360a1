"""Multi-token prediction of EXAONE 4.5 against a reference in plain torch, and its round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.errors import CheckpointError, UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_configs
from tests.helpers.exaone45 import changed
from tests.helpers.layouts import slow
from tests.helpers.mtp import mtp_of_megatron, mtp_of_reference, random_tokens
from tests.helpers.training import assert_gradients_equal


def _max_logit_difference(
    folder: Path, layout: Layout, depth: int = 1, like_layer: int = 0, **overrides: Any
) -> float:
    """Compare logits, and if these are equal, losses and gradients too.

    Returns:
        The maximum absolute difference of the logits.
    """
    fork = ForkLauncher(layout.ranks)
    reference = fork.first(
        mtp_of_reference, folder, random_tokens(), depth, like_layer, torch.float32, layout.cp
    )
    results = fork.all(mtp_of_megatron, folder, layout, random_tokens(), depth, overrides)
    assert any(result.logits for result in results)
    # The last positions of each depth have no label.
    worst = max(
        (megatron - expected)[:, : -1 - number].abs().max().item()
        for result in results
        if result.logits
        for number, (megatron, expected) in enumerate(
            zip(result.logits, reference.logits, strict=True)
        )
    )
    for result in results:
        assert not result.differing
        if worst <= 1e-4:
            losses = zip(result.losses, reference.losses, strict=bool(result.logits))
            assert all(abs(megatron - expected) <= 1e-4 for megatron, expected in losses)
            assert_gradients_equal(result.gradients, reference.gradients)
            mtp = [name for name in result.gradients if name.startswith("mtp.")]
            assert all(reference.gradients[name].any() for name in mtp)
    return worst


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, sp=True), Layout(cp=2), Layout(pp=2, vpp=2), *slow(Layout(tp=2, pp=2))],
    ids=str,
)
def test_logits_losses_and_gradients_equal_the_reference(
    megatron_bridge: Any, tiny: Any, layout: Layout
) -> None:
    assert _max_logit_difference(tiny("exaone45"), layout) <= 1e-4


def test_depth_of_two_with_shared_layers_equals_the_reference(
    megatron_bridge: Any, tiny: Any
) -> None:
    fields = changed(text_config__num_nextn_predict_layers=2, text_config__mtp_share_layers=True)
    assert _max_logit_difference(tiny("exaone45", **fields), Layout(), depth=2) <= 1e-4


def test_depth_of_two_with_separate_layers_is_not_supported(
    megatron_bridge: Any, tiny: Any
) -> None:
    """The checkpoint has one `mtp.fc` and one set of norms, Megatron-Core one per layer."""
    fields = changed(text_config__num_nextn_predict_layers=2, text_config__mtp_share_layers=False)
    folder = tiny("exaone45", **fields)
    with pytest.raises(UnsupportedConfig, match="mtp_share_layers"):
        ForkLauncher().first(mtp_of_megatron, folder, Layout(), random_tokens(), 2, {})


def test_full_attention_without_rope_equals_the_reference(megatron_bridge: Any, tiny: Any) -> None:
    """The overrides make the MTP layer like layer 3 of the decoder."""
    overrides = {"mtp_sliding": False, "mtp_use_rope": False}
    difference = _max_logit_difference(tiny("exaone45"), Layout(), like_layer=3, **overrides)
    assert difference <= 1e-4


def _train_and_save(folder: Path, target: Path, layout: Layout, mtp: int | None) -> None:
    """Add 1 to every parameter, and save."""
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


def test_trained_mtp_layers_are_exported(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    """The command line and AutoBridge export a checkpoint whose model was built with MTP layers."""
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


def test_mtp_tensors_that_were_not_built_are_passthrough(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    source = tiny("exaone45")
    ForkLauncher(1).all(_train_and_save, source, tmp_path / "megatron", Layout(), None)
    with pytest.raises(CheckpointError, match="file with the passthrough tensors"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    export_checkpoint(tmp_path / "megatron", tmp_path / "dropped", drop_passthrough=True)
    assert not any(
        name.startswith("mtp.") for name in load_file(tmp_path / "dropped/model.safetensors")
    )
    text = read_json(tmp_path / "dropped/config.json")["text_config"]
    assert text["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("frozen", ["freeze_mtp_model", "freeze_language_model"])
def test_mtp_layers_and_language_model_freeze_separately(
    megatron_bridge: Any, tiny: Any, frozen: str
) -> None:
    result = ForkLauncher().first(
        mtp_of_megatron, tiny("exaone45"), Layout(), random_tokens(), 1, {frozen: True}
    )
    trained = {
        name.startswith("mtp.")
        for name, value in result.gradients.items()
        if value.any() and ".visual." not in name
    }
    assert trained == {frozen == "freeze_language_model"}


def _swap_embedding_and_hidden_state(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    original = MultiTokenPredictionLayer._concat_embeddings
    patch.setattr(
        MultiTokenPredictionLayer, "_concat_embeddings", lambda self, a, b: original(self, b, a)
    )
    return {}


FAULTS = {
    "hidden state before embedding": _swap_embedding_and_hidden_state,
    "no RoPE": lambda patch: {"mtp_use_rope": False},
    "full attention": lambda patch: {"mtp_sliding": False},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_fault_changes_the_logits(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    overrides = FAULTS[fault](monkeypatch)
    assert _max_logit_difference(tiny("exaone45"), Layout(), **overrides) > 1e-3
