"""Verification of a model that takes images: prompts, gradients, thresholds and its card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import exaone_bridge
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.report.card import write_card
from exaone_bridge.verification.report.report import Report
from exaone_bridge.verification.self_test.fault import changed_model


@pytest.fixture(scope="module")
def report(megatron_bridge: Any, tiny: Any) -> Report:
    return exaone_bridge.verify(
        tiny("exaone45"), layout=Layout(tp=2, pp=2), generation=False, gradients=True
    )


def test_gradients_include_the_vision_encoder(report: Report) -> None:
    assert report.passed, report.failures()
    names = {name for name in report.tensors if not name.startswith("mtp.")}
    assert sum(".visual." in name for name in names) == 54
    assert report.check("gradients").metrics["gradients"] == len(names) == 145


def test_every_activation_is_far_from_its_threshold(
    megatron_bridge: Any, tiny: Any, report: Report
) -> None:
    """Within a quarter, as documented: the threshold counts the vision encoder's rounding."""
    more = exaone_bridge.verify(tiny("exaone45"), generation=False, seed=1)
    for each in (report, more):
        assert max(diff.difference / diff.threshold for diff in each.activations) < 0.25


def test_the_card_describes_vision_encoder_images_and_mtp(report: Report, tmp_path: Path) -> None:
    write_card(report, tmp_path / "card.md", name="M")
    text = (tmp_path / "card.md").read_text()
    assert "3 of 65 tokens, 2 of 7 tokens, 3 of 65 tokens with 5 images and 1 video." in text
    assert "vision encoder of 4 blocks, hidden 48, heads 4/2 x 12, MLP 56" in text
    assert (
        "windows of 24 pixels, full attention in blocks 1, 3; multi-token prediction of depth 1, "
        "1 layer on disk." in text
    )


def _trained(folder: Path, target: Path, name: str) -> Path:
    """A copy with one tensor doubled."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file(
        tensors | {name: tensors[name] * 2}, target / "model.safetensors", metadata={"format": "pt"}
    )
    return target


def test_two_folders_are_compared_on_prompts_with_images(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """A copy passes; another vision encoder changes the logits of prompts with images."""
    folder = tiny("exaone45")
    shutil.copytree(folder, tmp_path / "copy")
    same = exaone_bridge.verify(folder, tmp_path / "copy", generation=False)
    assert same.passed and same.check("logits").metrics["max"] < 1e-4, same.failures()
    other = _trained(folder, tmp_path / "other", "model.visual.blocks.2.mlp.down_proj.weight")
    found = exaone_bridge.verify(folder, other, generation=False)
    assert not found.check("tensors").passed and not found.check("logits").passed


def test_multi_token_prediction_goes_through_the_model(megatron_bridge: Any, tiny: Any) -> None:
    """Its tensors are not passthrough tensors then: a change of one is exported."""
    found = exaone_bridge.verify(
        tiny("exaone45"), layout=Layout(tp=2, pp=2), generation=False, mtp=True
    )
    assert found.passed, found.failures()
    assert found.setup["mtp_num_layers"] == 1 and found.check("tensors").metrics["tensors"] == 160
    with pytest.raises(UnsupportedConfig, match="multi-token prediction that can be built"):
        exaone_bridge.verify(tiny("exaone4"), mtp=True)

    def change(model: list[Any]) -> None:
        for chunk in model:
            for name, parameter in chunk.named_parameters():
                if name.endswith("eh_proj.weight"):
                    parameter[0, 0] += 1

    with changed_model(change):
        found = exaone_bridge.verify(tiny("exaone45"), generation=False, mtp=True)
    assert (
        found.check("tensors").metrics["names"] == ["mtp.fc.weight"]
        and found.check("logits").passed
    )


def test_prompts_with_images_have_an_affordable_length() -> None:
    """The published window would make prompts of 8201 tokens, and 10 GB of scores per layer."""
    model_config = read_hf_config(CONFIGS["exaone45_33b"])
    tokens, images = image_prompts(model_config, 4, 0, 64)
    assert tokens.shape == (4, 64) and [len(each.get("image_grid_thw", ())) for each in images] == [
        1,
        3,
        1,
        0,
    ]
    assert image_prompts(model_config, 1, 0)[0].shape == (1, 2 * 4096 + 9)
