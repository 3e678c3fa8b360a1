"""EXAONE 4.5 against Transformers: logits with and without images, bitwise round trips, wrong images refused.

`verify` runs text past the window, and prompts with one image, several of different sizes, a video, and none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_headers, read_json
from exaone_bridge.convert.convert import export_checkpoint, import_checkpoint
from exaone_bridge.errors import VisionInputError
from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts, prompt_of
from exaone_bridge.modules.context_parallel import restore_sequence_order
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import (
    compare_configs,
    compare_files,
    compare_tensors,
)
from exaone_bridge.verification.workflow.job import VerifyOptions
from exaone_bridge.verification.workflow.layerwise import verify_layerwise
from exaone_bridge.verification.workflow.verify import verify
from tests.helpers.exaone45_cases import CONFIG, LAYOUTS, changed
from tests.helpers.parity import assert_passes

pytestmark = pytest.mark.usefixtures("references")

F = "full_attention"

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "bfloat16 on disk": {
        "dtype": "bfloat16",
        "text_config__dtype": "bfloat16",
        "vision_config__dtype": "bfloat16",
    },
    "no key-value groups, every block sees all": {
        "vision_config__num_key_value_heads": 4,
        "vision_config__fullatt_block_indexes": [0, 1, 2, 3],
    },
    "one key-value head, no block sees all, other tokens": {
        "vision_config__num_key_value_heads": 1,
        "vision_config__fullatt_block_indexes": [],
        "image_token_id": 11,
        "video_token_id": 200,
    },
    "nothing beside the model, all layers global, three patches a side": {
        "text_config__num_nextn_predict_layers": 0,
        "text_config__layer_types": [F] * 8,
        "text_config__sliding_window": None,
        "vision_config__spatial_merge_size": 3,
        "vision_config__temporal_patch_size": 1,
    },
}


def _assert_passes(folder: Path, layout: Layout) -> None:
    report = assert_passes(folder, layout, VerifyOptions(count=4))
    assert report.setup["prompts"][2][0] == 4  # the prompts with images


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    _assert_passes(tiny("exaone45"), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(megatron_bridge: Any, tiny: Any, case: str) -> None:
    layout = Layout(tp=2, pp=2) if case == "tied" else Layout()
    _assert_passes(tiny("exaone45", **changed(**CONFIGURATIONS[case])), layout)


def test_import_and_export(megatron_bridge: Any, tiny: Any, tmp_path: Path) -> None:
    """From the Megatron checkpoint alone: tensors, multi-token prediction's too, nested configurations, processors."""
    source = tiny("exaone45")
    assert set(HFCheckpoint.open(source).passthrough) == {
        n for n in read_headers(source) if n.startswith("mtp.")
    }
    assert len(HFCheckpoint.open(source).passthrough) == 15
    import_checkpoint(source, tmp_path / "megatron", Layout(tp=2, pp=2))
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    checks = (
        compare_tensors(source, tmp_path / "exported"),
        compare_files(source, tmp_path / "exported"),
        compare_configs(
            read_json(source / "config.json"), read_json(tmp_path / "exported/config.json")
        ),
    )
    assert all(check.passed for check in checks), [check.details for check in checks]
    assert (tmp_path / "exported/preprocessor_config.json").is_file()


def _exported_from(megatron: Path, source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    bridge.save_hf_pretrained(
        load_megatron(bridge, megatron, Layout(tp=2, pp=2)), target, show_progress=False
    )


def test_megatron_core_loads_what_import_wrote(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """At another layout; and AutoBridge exports it bitwise."""
    source = tiny("exaone45")
    import_checkpoint(source, tmp_path / "megatron", Layout())
    ForkLauncher(4).all(_exported_from, tmp_path / "megatron", source, tmp_path / "exported")
    check = compare_tensors(source, tmp_path / "exported")
    assert check.passed, check.details


def _logits_of_batch(
    folder: Path, tokens: torch.Tensor, images: dict[str, torch.Tensor], cp: int
) -> Any:
    """A whole batch in one forward pass."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(cp=cp))
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(tokens.shape[1])[None], None, **images)


def _reference(
    folder: Path, tokens: torch.Tensor, images: list[dict[str, torch.Tensor]]
) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat(
            [model(one[None], **each).logits for one, each in zip(tokens, images, strict=True)]
        )


def test_one_batch_of_text_images_and_video(megatron_bridge: Any, tiny: Any) -> None:
    """Samples without images beside samples with some; images placed anywhere, also at both ends."""
    from exaone_bridge.verification.workflow.transformers import together

    tokens, images = image_prompts(read_hf_config(CONFIG), 4, seed=5)
    order = [3, 1, 2, 0]
    tokens, images = tokens[order], [images[number] for number in order]
    (expected,) = ForkLauncher(1).all(_reference, tiny("exaone45"), tokens, images)
    (found,) = ForkLauncher(1).all(_logits_of_batch, tiny("exaone45"), tokens, together(images), 1)
    assert (found - expected).abs().max() <= 1e-4


def _whole_sequences(folder: Path, tokens: torch.Tensor, images: dict[str, torch.Tensor]) -> Any:
    """As Megatron-Bridge's step for models with images calls the model."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(cp=2))
    positions = torch.arange(tokens.shape[1] - 1)[None].expand(len(tokens), -1)
    mask = torch.ones(len(tokens), tokens.shape[1] - 1)
    with torch.no_grad():
        loss, cut = model.eval()(
            tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask, **images
        )
    assert cut.shape == loss.shape == (len(tokens), positions.shape[1] // 2)
    return loss


def test_context_parallelism_cuts_whole_sequences(megatron_bridge: Any, tiny: Any) -> None:
    from exaone_bridge.verification.workflow.transformers import together

    tokens, images = image_prompts(read_hf_config(CONFIG), 4, seed=5)
    tokens = torch.cat(
        (tokens, torch.full((4, 5 - tokens.shape[1] % 4), 7)), dim=1
    )  # S a multiple of four
    (logits,) = ForkLauncher(1).all(_reference, tiny("exaone45"), tokens[:, :-1], images)
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    parts = ForkLauncher(2).all(_whole_sequences, tiny("exaone45"), tokens, together(images))
    assert (restore_sequence_order(parts, 1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("streaming", [False, True])
def test_all_that_verify_can_check(megatron_bridge: Any, tiny: Any, streaming: bool) -> None:
    """Generation and gradients too; and a layer at a time."""
    if streaming:
        report = verify_layerwise(tiny("exaone45"), Layout(tp=2))
    else:
        report = verify(tiny("exaone45"), Layout(), VerifyOptions(generation=True, gradients=True))
    assert report.passed, report.failures()


def _refused(folder: Path, cases: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> list[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout())
    said = []
    for tokens, images in cases:
        with pytest.raises(VisionInputError) as caught:
            model(tokens, torch.arange(tokens.shape[1])[None], None, **images)
        said.append(str(caught.value))
    return said


def test_wrong_counts_are_refused_with_both_numbers(megatron_bridge: Any, tiny: Any) -> None:
    model_config = read_hf_config(CONFIG)
    tokens, images = prompt_of(
        model_config, [("image", (1, 4, 6)), ("text", 5)], torch.Generator().manual_seed(0)
    )
    tokens = tokens[None]
    video = {
        "pixel_values_videos": images["pixel_values"],
        "video_grid_thw": images["image_grid_thw"],
    }
    without_grid = {"pixel_values": images["pixel_values"]}
    cut = images | {"pixel_values": images["pixel_values"][:-4]}
    cases = [(tokens[:, 1:], images), (tokens, video), (tokens, without_grid), (tokens, cut)]
    (said,) = ForkLauncher(1).all(_refused, tiny("exaone45"), cases)
    numbers = [re.findall(r"\d+", text.replace("id 67", "").replace("id 68", "")) for text in said]
    assert numbers == [["5", "6"], ["0", "6"], ["24"], ["20", "24"]]
    assert "image" in said[0] and "video" in said[1]
