"""The collate function for conversations with images, and its registration with Megatron-Bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from exaone_bridge.errors import VisionInputError
from tests.helpers.processors import HAS_TORCHVISION, load_processor


@pytest.fixture(scope="module")
def hf_path(tiny: Any) -> Path:
    return tiny("exaone45")


@pytest.fixture(scope="module")
def processor(megatron_bridge: Any, hf_path: Path) -> Any:
    return load_processor(hf_path)


@pytest.fixture(scope="module")
def collate(megatron_bridge: Any) -> Any:
    from exaone_bridge.models.exaone45.collate import exaone45_collate

    return exaone45_collate


def _example(*parts: Any, answer: str = "yes", **fields: Any) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("user", list(parts)), ("assistant", answer)]
    conversation = [{"role": role, "content": content} for role, content in turns]
    return {"conversation": conversation, **fields}


def test_collate_is_registered_before_and_after_import(megatron_bridge: Any, collate: Any) -> None:
    """Megatron-Bridge has none; that of exaone_bridge serves examples without images too."""
    from megatron.bridge.data.collators import registry

    from exaone_bridge.patches.vlm_data import collators

    assert registry.resolve_model_collate("Exaone4_5_Processor") is collate
    del registry._MODEL_COLLATE_SPECS["Exaone4_5_Processor"]
    registry.resolve_model_collate.cache_clear()
    with pytest.raises(ValueError, match="No VLM collate function"):
        registry.resolve_model_collate("Exaone4_5_Processor")
    collators.apply()
    assert registry.resolve_model_collate("Exaone4_5_Processor") is collate
    assert registry.model_collate_required_for_all_examples("Exaone4_5_Processor")


def test_collate_is_used_by_mock_data_and_energon(
    hf_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.bridge.data.builders import MockVLMSFTDatasetBuilder, MockVLMSFTDatasetConfig
    from megatron.bridge.data.energon.hf_task_encoder import HFTaskEncoder
    from transformers import AutoProcessor

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    config = MockVLMSFTDatasetConfig(
        seq_length=256,
        hf_processor_path=str(hf_path),
        image_size=(32, 24),
        num_images=2,
        num_base_examples=3,
    )
    dataset, _, _ = MockVLMSFTDatasetBuilder(config).build(DatasetBuildContext(4, 0, 0))
    batch = dataset.collate_fn([dataset[0], dataset[1]])
    assert batch["visual_inputs"].image_grid_thw.tolist() == [[1, 6, 8]] * 4
    assert batch["loss_mask"].sum() > 20
    encoder = HFTaskEncoder(processor, seq_length=256)
    encoded = encoder.collate_fn([dataset[0], dataset[1]])
    assert torch.equal(encoded["input_ids"], batch["input_ids"])


def test_collate_takes_images_in_order_and_masks_all_but_answers(
    processor: Any, collate: Any
) -> None:
    """`images` fill parts in order; the loss covers all answers, not the empty thinking block."""
    wide, high = Image.new("RGB", (48, 16), (9, 9, 9)), Image.new("RGB", (16, 32), (250, 9, 9))
    text = {"type": "text", "text": "Which?", "image": None}  # Arrow fills absent fields with None
    example = _example({"type": "image"}, text, {"type": "image", "image": high}, images=[wide])
    example["conversation"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\n\n</think>\n\nquite"},
    ]
    batch = collate([example], processor, sequence_length=256, pad_to_multiple_of=8)
    assert batch["visual_inputs"].image_grid_thw.tolist() == [[1, 4, 12], [1, 8, 4]]
    labels = batch["labels"][0][batch["loss_mask"][0] > 0]
    assert processor.tokenizer.decode(labels) == "yes[|endofturn|]quite[|endofturn|]"
    assert batch["input_ids"].shape[1] % 8 == 0


def test_collate_with_max_pixels_resizes_images(processor: Any, collate: Any) -> None:
    example = _example({"type": "image", "image": Image.new("RGB", (48, 16), (9, 9, 9))})
    batch = collate([example], processor, max_pixels=256)
    assert batch["visual_inputs"].image_grid_thw.prod() <= 16  # of 4 x 4 pixels


def test_collate_of_inconsistent_conversation_raises(processor: Any, collate: Any) -> None:
    image = Image.new("RGB", (32, 32))
    part = {"type": "image", "image": image}
    with pytest.raises(VisionInputError, match="`images` has 1 more than its conversation"):
        collate([_example(part, images=[image])], processor)
    with pytest.raises(VisionInputError, match="list `images` has no other left"):
        collate([_example({"type": "image"})], processor)
    placeholder = {"type": "text", "text": "<|image_pad|>"}
    with pytest.raises(VisionInputError, match="yields 2 tokens with image_token_id=67 for 1 imag"):
        collate([_example(part, placeholder)], processor)
    text = {"type": "text", "text": "token " * 9}
    with pytest.raises(VisionInputError, match="has images beyond the 40 that are kept"):
        collate([_example(text, part)], processor, sequence_length=40)


@pytest.mark.skipif(not HAS_TORCHVISION, reason="Transformers' video processor needs torchvision")
def test_collate_of_video_equals_the_processor(processor: Any, collate: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 255, (4, 3, 32, 48), generator=generator, dtype=torch.uint8)
    image = Image.new("RGB", (32, 32))
    example = _example({"type": "video", "video": frames}, {"type": "image", "image": image})
    batch = collate([example], processor, sequence_length=256)
    text = processor.apply_chat_template(example["conversation"], tokenize=False)
    expected = processor(text=[text], videos=[frames], images=[image], return_tensors="pt")
    tokens = expected["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(tokens)], tokens)
    placeholders = int((tokens == processor.video_token_id).sum())
    assert placeholders * 4 == int(expected["video_grid_thw"].prod()) > 0
    for name in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw"):
        assert torch.equal(getattr(batch["visual_inputs"], name), expected[name]), name
