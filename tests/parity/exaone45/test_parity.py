"""EXAONE 4.5 against Transformers: logits with and without images, bitwise round trips, errors.

`verify` runs text longer than the window, and prompts with an image, several, a video, and none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_headers
from exaone_bridge.convert.to_hf import export_checkpoint
from exaone_bridge.convert.to_megatron import import_checkpoint
from exaone_bridge.errors import VisionInputError
from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts, make_prompt
from exaone_bridge.modules.context_parallel import restore_sequence_order
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from exaone_bridge.verification.workflow.options import VerifyOptions
from exaone_bridge.verification.workflow.run import Session, run
from exaone_bridge.verification.workflow.transformers import load
from exaone_bridge.verification.workflow.workload import batch_images
from tests.helpers.exaone45 import CONFIG, changed
from tests.helpers.layouts import LAYOUTS, slow
from tests.helpers.parity import assert_passes, assert_same_folder
from tests.helpers.training import Images

pytestmark = pytest.mark.usefixtures("cached_references")

F = "full_attention"

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "bfloat16 on disk": {
        "dtype": "bfloat16",
        "text_config__dtype": "bfloat16",
        "vision_config__dtype": "bfloat16",
    },
    "vision encoder with multi-head, full attention": {
        "vision_config__num_key_value_heads": 4,
        "vision_config__fullatt_block_indexes": [0, 1, 2, 3],
    },
    "vision encoder with multi-query, window attention, other placeholder tokens": {
        "vision_config__num_key_value_heads": 1,
        "vision_config__fullatt_block_indexes": [],
        "image_token_id": 11,
        "video_token_id": 200,
    },
    "no MTP tensors, full attention, three patches per side": {
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


@pytest.mark.parametrize("layout", [*LAYOUTS, *slow(Layout(tp=2, cp=2, sp=True))], ids=str)
def test_parity_at_each_layout(megatron_bridge: Any, tiny: Any, layout: Layout) -> None:
    _assert_passes(tiny("exaone45"), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_parity_of_each_configuration(megatron_bridge: Any, tiny: Any, case: str) -> None:
    layout = Layout(tp=2, pp=2) if case == "tied" else Layout()
    _assert_passes(tiny("exaone45", **changed(**CONFIGURATIONS[case])), layout)


def test_import_and_export_equal_the_source(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    """The export has the MTP tensors, the nested config and the processor files."""
    source = tiny("exaone45")
    passthrough = set(HFCheckpoint.open(source).passthrough)
    assert passthrough == {name for name in read_headers(source) if name.startswith("mtp.")}
    assert len(passthrough) == 15
    import_checkpoint(source, tmp_path / "megatron", Layout(tp=2, pp=2))
    export_checkpoint(tmp_path / "megatron", tmp_path / "exported")
    assert_same_folder(source, tmp_path / "exported")
    assert (tmp_path / "exported/preprocessor_config.json").is_file()


def _load_and_export(megatron: Path, source: Path, target: Path) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import load_megatron

    bridge = AutoBridge.from_hf_pretrained(source)
    model = load_megatron(bridge, megatron, Layout(tp=2, pp=2))
    bridge.save_hf_pretrained(model, target, show_progress=False)


def test_megatron_checkpoint_loads_at_another_layout(
    megatron_bridge: Any, tiny: Any, tmp_path: Path
) -> None:
    source = tiny("exaone45")
    import_checkpoint(source, tmp_path / "megatron", Layout())
    ForkLauncher(4).all(_load_and_export, tmp_path / "megatron", source, tmp_path / "exported")
    check = compare_tensors(source, tmp_path / "exported")
    assert check.passed, check.details


def _megatron_logits(folder: Path, tokens: torch.Tensor, images: Images) -> torch.Tensor:
    """Run all prompts [N, S] in one forward pass."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout())
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(tokens.shape[1])[None], None, **images)


def _hf_logits(folder: Path, tokens: torch.Tensor, images: list[Images]) -> torch.Tensor:
    """Run each prompt [S] of [N, S] alone."""
    model = load(folder, torch.float32)
    with torch.no_grad():
        logits = [
            model(prompt[None], **prompt_images).logits
            for prompt, prompt_images in zip(tokens, images, strict=True)
        ]
    return torch.cat(logits)


def test_batch_of_text_images_and_video_equals_single_prompts(
    megatron_bridge: Any, tiny: Any
) -> None:
    """Images are at any position, the first and the last too; one prompt has none."""
    tokens, images = image_prompts(read_hf_config(CONFIG), 4, seed=5)
    order = [3, 1, 2, 0]
    tokens, images = tokens[order], [images[number] for number in order]
    fork, folder = ForkLauncher(), tiny("exaone45")
    expected = fork.first(_hf_logits, folder, tokens, images)
    logits = fork.first(_megatron_logits, folder, tokens, batch_images(images))
    assert (logits - expected).abs().max() <= 1e-4


def _losses_of_full_sequences(folder: Path, tokens: torch.Tensor, images: Images) -> torch.Tensor:
    """Call the model as Megatron-Bridge's step for vision models does, with unsharded sequences.

    Returns:
        The losses [N, S / cp] of this rank's shard.
    """
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(cp=2))
    positions = torch.arange(tokens.shape[1] - 1)[None].expand(len(tokens), -1)
    mask = torch.ones(len(tokens), tokens.shape[1] - 1)
    with torch.no_grad():
        loss, local_mask = model.eval()(
            tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask, **images
        )
    assert local_mask.shape == loss.shape == (len(tokens), positions.shape[1] // 2)
    return loss


def test_model_shards_full_sequences_over_cp(megatron_bridge: Any, tiny: Any) -> None:
    tokens, images = image_prompts(read_hf_config(CONFIG), 4, seed=5)
    padding = torch.full((4, 5 - tokens.shape[1] % 4), 7)  # four divides S
    tokens = torch.cat((tokens, padding), dim=1)
    fork, folder = ForkLauncher(2), tiny("exaone45")
    logits = fork.first(_hf_logits, folder, tokens[:, :-1], images)
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    shards = fork.all(_losses_of_full_sequences, folder, tokens, batch_images(images))
    assert (restore_sequence_order(shards, 1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("layerwise", [False, True])
def test_verify_passes_every_check(megatron_bridge: Any, tiny: Any, layerwise: bool) -> None:
    if layerwise:
        layout, options = Layout(tp=2), VerifyOptions(stream=True)
    else:
        layout, options = Layout(), VerifyOptions(generation=True, gradients=True)
    report = run(Session(source=tiny("exaone45"), layout=layout, options=options))
    assert report.passed, report.failures()


def _errors(folder: Path, cases: list[tuple[torch.Tensor, Images]]) -> list[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout())
    errors = []
    for tokens, images in cases:
        with pytest.raises(VisionInputError) as raised:
            model(tokens, torch.arange(tokens.shape[1])[None], None, **images)
        errors.append(str(raised.value))
    return errors


def test_images_that_do_not_match_the_placeholders_are_rejected(
    megatron_bridge: Any, tiny: Any
) -> None:
    model_config = read_hf_config(CONFIG)
    parts = [("image", (1, 4, 6)), 5]
    tokens, images = make_prompt(model_config, parts, torch.Generator().manual_seed(0))
    tokens = tokens[None]
    video = {
        "pixel_values_videos": images["pixel_values"],
        "video_grid_thw": images["image_grid_thw"],
    }
    without_grid = {"pixel_values": images["pixel_values"]}
    too_few = images | {"pixel_values": images["pixel_values"][:-4]}
    cases = [(tokens[:, 1:], images), (tokens, video), (tokens, without_grid), (tokens, too_few)]
    errors = ForkLauncher().first(_errors, tiny("exaone45"), cases)
    numbers = [
        re.findall(r"\d+", text.replace("id=67", "").replace("id=68", "")) for text in errors
    ]
    assert numbers == [["5", "6"], ["0", "6"], ["24"], ["20", "24"]]
    assert "image" in errors[0] and "video" in errors[1]
