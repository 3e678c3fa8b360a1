"""Conversations with images, from files to gradients: the host's data sets, our collation, the host's step for models
with images, against Transformers on the same conversations, in fp32 on the CPU.

Transformers' processor of videos needs torchvision. Where that is missing, so is the processor of videos, and the rest
of the processor is put together by hand; all else is the host's own way.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnsupportedLayout, VisionInputError
from exaone_bridge.recipes import recipe
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.paths import ROOT
from tests.helpers.training import relative_difference

EXAMPLES = str(ROOT / "examples")
LENGTH = 128


@pytest.fixture(scope="module")
def folder(tiny: Any) -> Path:
    return tiny("exaone45")


@pytest.fixture(scope="module")
def data(megatron_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pictures and questions about them, as `examples/sft_images.py` draws them."""
    sys.path.insert(0, EXAMPLES)
    import sft_images

    target = tmp_path_factory.mktemp("data") / "pictures"
    sft_images.write_pictures(target, training=10, validation=5)
    yield target
    sys.path.remove(EXAMPLES)
    for name in ("common", "sft_images"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def processor(megatron_bridge: Any, folder: Path) -> Any:
    from transformers import AutoProcessor, AutoTokenizer, Exaone4_5_Processor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    if importlib.util.find_spec("torchvision") is not None:
        return AutoProcessor.from_pretrained(folder)
    made = object.__new__(Exaone4_5_Processor)
    made.tokenizer = AutoTokenizer.from_pretrained(folder)
    made.image_processor, made.video_processor = (
        Qwen2VLImageProcessorPil.from_pretrained(folder),
        None,
    )
    made.chat_template = made.tokenizer.chat_template
    for kind in ("image", "video"):
        token = f"<|{kind}_pad|>"
        setattr(made, f"{kind}_token", token)
        setattr(made, f"{kind}_token_id", made.tokenizer.convert_tokens_to_ids(token))
    return made


@pytest.fixture
def found_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host loads from the folder."""
    from transformers import AutoProcessor

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)


def _config(folder: Path, data: Path, **more: Any) -> Any:
    return recipe("exaone45_vl_tiny_sft_config")(
        hf_path=folder,
        dataset_root=data,
        seq_length=LENGTH,
        micro_batch_size=2,
        global_batch_size=4,
        **more,
    )


def _dataset(config: Any) -> Any:
    """The training split, as the host's loop builds it."""
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.bridge.data.builders import DirectHFSFTDatasetBuilder

    config.dataset.finalize()
    train, validation, test = DirectHFSFTDatasetBuilder(config.dataset).build(
        DatasetBuildContext(10, 5, 0)
    )
    assert len(train) == 10 and len(validation) == 5 and test is None
    return train


def _batches(config: Any) -> list[dict[str, Any]]:
    """Two and two; the first has a sample without pictures and one with two; the last is words alone."""
    dataset = _dataset(config)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, collate_fn=dataset.collate_fn, sampler=range(6)
    )
    return [*loader, dataset.collate_fn([dataset[0], dataset[5]])]


def _lines(data: Path) -> list[tuple[list[Path], str, str]]:
    """(pictures, question, answer) of each line, read without the host."""
    found = []
    for line in (data / "training.jsonl").read_text().splitlines():
        user, assistant = (turn["content"] for turn in json.loads(line)["messages"])
        found.append(
            ([data / part["path"] for part in user[:-1]], user[-1]["text"], assistant[0]["text"])
        )
    return found


ORDER = [(0, 1), (2, 3), (4, 5), (0, 5)]


def _theirs(folder: Path, data: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' mean loss of a word of an answer, over all batches, and its gradients: one sample at a time, each
    with words written out here."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    losses = []
    lines = _lines(data)
    for pictures, question, answer in (lines[number] for pair in ORDER for number in pair):
        seen = (
            pixels([Image.open(each) for each in pictures], return_tensors="pt") if pictures else {}
        )
        places = [int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", ())]
        asked = (
            "".join(f"<vision>{'<|image_pad|>' * count}</vision>" for count in places) + question
        )
        before = tokenizer(f"[|user|]\n{asked}[|endofturn|]\n[|assistant|]\n", return_tensors="pt")[
            "input_ids"
        ]
        after = tokenizer(f"{answer}[|endofturn|]", return_tensors="pt")["input_ids"]
        logits = model(torch.cat((before, after), 1), use_cache=False, **seen).logits[
            0, before.shape[1] - 1 : -1
        ]
        losses.append(torch.nn.functional.cross_entropy(logits, after[0], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    return loss.item(), gradients


def _ours(
    folder: Path, layout: Layout, config: Any, batches: list[dict[str, Any]]
) -> tuple[float | None, dict[str, torch.Tensor]]:
    """On a rank: the same through the host's step and Megatron-Core's schedule, with what the recipe freezes."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.vlm_step import forward_step
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider()
    names = (
        "freeze_vision_model",
        "freeze_vision_projection",
        "freeze_language_model",
        "calculate_per_token_loss",
    )
    fields = {name: getattr(config.model, name) for name in names}
    provider.apply_overrides_and_finalize(torch.float32, layout.provider_overrides() | fields)
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=True)
    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    nothing = SimpleNamespace(start=lambda: None, stop=lambda: None)
    state = SimpleNamespace(
        cfg=config, timers=lambda *_, **__: nothing, straggler_timer=_Straggler()
    )
    model[0].train()
    model[0].zero_grad_buffer()
    done = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, state),
        data_iterator=iter(batches),
        model=model[0],
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    loss = None
    if done:
        total, count = sum(each["lm loss"] for each in done)
        both = torch.stack((total, count))
        torch.distributed.all_reduce(both, group=parallel_state.get_context_parallel_group())
        loss = (both[0] / both[1]).item()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.data.copy_(
                parameter.main_grad
            ) if parameter.requires_grad else parameter.data.zero_()
    weights = bridge.export_hf_weights(model, cpu=True, show_progress=False)
    return loss, {name: value.clone() for name, value in weights if not name.startswith("mtp.")}


class _Straggler(contextlib.nullcontext):  # type: ignore[type-arg]
    """The host's timer, which is a context and makes others."""

    def __call__(self, **_: Any) -> Any:
        return self


@pytest.fixture(scope="module")
def reference(
    megatron_bridge: Any, folder: Path, data: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    return ForkLauncher(1).all(_theirs, folder, data)[0]


@pytest.mark.parametrize(
    ("layout", "packed"),
    [
        (Layout(), False),
        (Layout(), True),
        (Layout(tp=2, sp=True), False),
        (Layout(pp=2), False),
        (Layout(tp=2, cp=2, sp=True), False),
    ],
    ids=str,
)
def test_loss_and_gradients(
    folder: Path, data: Path, found_processor: None, reference: Any, layout: Layout, packed: bool
) -> None:
    """Words and pictures mixed; the tower is frozen, its merger and the language model learn of the answers alone."""
    config = _config(folder, data, packed=packed)
    batches = _batches(config)
    expected, gradients = reference
    results = ForkLauncher(layout.ranks).all(_ours, folder, layout, config, batches)
    losses = [loss for loss, _ in results if loss is not None]
    assert losses and all(abs(loss - expected) <= 1e-4 for loss in losses)
    for _, found in results:
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            if ".visual." in name and ".merger." not in name:
                assert not found[name].any(), name
            else:
                assert gradient.any() and relative_difference(found[name], gradient) <= 1e-4, name


def test_the_comparison_can_fail(
    folder: Path, data: Path, found_processor: None, reference: Any
) -> None:
    """Learning the questions too, or a picture in another's place, is seen."""
    config = _config(folder, data)
    batches = _batches(config)
    for batch in batches:
        batch["labels"] = torch.nn.functional.pad(batch["input_ids"][:, 1:], (0, 1))
        batch["loss_mask"] = batch["attention_mask"].float()
    (asked, _), *_ = ForkLauncher(1).all(_ours, folder, Layout(), config, batches)
    batches = _batches(config)
    seen = batches[1]["visual_inputs"]
    seen.pixel_values = seen.pixel_values.flip(0)
    (swapped, _), *_ = ForkLauncher(1).all(_ours, folder, Layout(), config, batches)
    assert min(abs(asked - reference[0]), abs(swapped - reference[0])) > 1e-3


def test_what_is_learned(folder: Path, data: Path, processor: Any, found_processor: None) -> None:
    """The answers and the word that ends them; no question, no picture, no padding."""
    lines = _lines(data)
    for pair, batch in zip(ORDER, _batches(_config(folder, data)), strict=True):
        assert batch["input_ids"].shape == batch["labels"].shape == (2, LENGTH)
        for row, number in enumerate(pair):
            pictures, question, answer = lines[number]
            learned = batch["labels"][row] != -100
            assert torch.equal(learned, batch["loss_mask"][row] > 0)
            assert (
                processor.tokenizer.decode(batch["labels"][row][learned])
                == f"{answer}[|endofturn|]"
            )
            words = processor.tokenizer.decode(batch["input_ids"][row])
            assert (
                words.count("<vision>") == len(pictures) == words.count("</vision>")
                and question in words
            )
            assert words.count("<|image_pad|>") == 16 * len(pictures)
            # Each word is the next one's label.
            assert torch.equal(
                batch["labels"][row][learned], batch["input_ids"][row].roll(-1)[learned]
            )
        assert (batch["visual_inputs"].pixel_values is None) == (pair == (0, 5))


def test_mock_data_and_energon_find_the_collation(
    folder: Path, processor: Any, found_processor: None
) -> None:
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.bridge.data.builders import MockVLMSFTDatasetBuilder, MockVLMSFTDatasetConfig
    from megatron.bridge.data.energon.hf_task_encoder import HFTaskEncoder

    mock = MockVLMSFTDatasetConfig(
        seq_length=256,
        hf_processor_path=str(folder),
        image_size=(32, 24),
        num_images=2,
        num_base_examples=3,
    )
    dataset, _, _ = MockVLMSFTDatasetBuilder(mock).build(DatasetBuildContext(4, 0, 0))
    batch = dataset.collate_fn([dataset[0], dataset[1]])
    assert (
        batch["visual_inputs"].image_grid_thw.tolist() == [[1, 6, 8]] * 4
        and batch["loss_mask"].sum() > 20
    )
    again = HFTaskEncoder(processor, seq_length=256).collate_fn([dataset[0], dataset[1]])
    assert torch.equal(again["input_ids"], batch["input_ids"])


def test_the_host_has_none_of_its_own(megatron_bridge: Any) -> None:
    """Entered whether its table was imported before us or after; and for examples of words alone too."""
    from megatron.bridge.data.collators import registry

    from exaone_bridge.models.exaone45.collate import exaone45_collate
    from exaone_bridge.patches.vlm_data import collators

    assert registry.resolve_model_collate("Exaone4_5_Processor") is exaone45_collate
    del registry._MODEL_COLLATE_SPECS["Exaone4_5_Processor"]
    registry.resolve_model_collate.cache_clear()
    with pytest.raises(ValueError, match="No VLM collate function"):
        registry.resolve_model_collate("Exaone4_5_Processor")
    collators.apply()
    assert registry.resolve_model_collate("Exaone4_5_Processor") is exaone45_collate
    assert registry.model_collate_required_for_all_examples("Exaone4_5_Processor")


def _asked(*parts: Any, answer: str = "yes", **more: Any) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("user", list(parts)), ("assistant", answer)]
    return {"conversation": [{"role": role, "content": content} for role, content in turns], **more}


def test_pictures_beside_the_conversation_and_turns_before_the_last(
    processor: Any, data: Path
) -> None:
    """`images` fill parts in their order; every answer is learned, and an empty thought before it is not."""
    from PIL import Image

    from exaone_bridge.models.exaone45.collate import exaone45_collate

    wide, high = Image.new("RGB", (48, 16), (9, 9, 9)), Image.new("RGB", (16, 32), (250, 9, 9))
    words = {"type": "text", "text": "Which?", "image": None}  # as Arrow fills it in
    example = _asked({"type": "image"}, words, {"type": "image", "image": high}, images=[wide])
    example["conversation"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\n\n</think>\n\nquite"},
    ]
    batch = exaone45_collate([example], processor, sequence_length=256, pad_to_multiple_of=8)
    assert batch["visual_inputs"].image_grid_thw.tolist() == [[1, 4, 12], [1, 8, 4]]
    learned = batch["labels"][0][batch["loss_mask"][0] > 0]
    assert processor.tokenizer.decode(learned) == "yes[|endofturn|]quite[|endofturn|]"
    assert batch["input_ids"].shape[1] % 8 == 0
    smaller = exaone45_collate(
        [_asked({"type": "image", "image": wide})], processor, max_pixels=256
    )
    assert smaller["visual_inputs"].image_grid_thw.prod() <= 16  # of 4 x 4 pixels


def test_wrong_conversations_are_refused(processor: Any) -> None:
    from PIL import Image

    from exaone_bridge.models.exaone45.collate import exaone45_collate

    picture = Image.new("RGB", (32, 32))
    here = {"type": "image", "image": picture}
    with pytest.raises(VisionInputError, match="has 1 more than its conversation has parts for"):
        exaone45_collate([_asked(here, images=[picture])], processor)
    with pytest.raises(VisionInputError, match="list `images` has no other left"):
        exaone45_collate([_asked({"type": "image"})], processor)
    with pytest.raises(VisionInputError, match="made 2 places of a conversation that has 1"):
        exaone45_collate([_asked(here, {"type": "text", "text": "<|image_pad|>"})], processor)
    with pytest.raises(VisionInputError, match="has images beyond the 40 that are kept"):
        exaone45_collate(
            [_asked({"type": "text", "text": "word " * 9}, here)], processor, sequence_length=40
        )


def test_packed_rows_are_not_cut(folder: Path, data: Path, found_processor: None) -> None:
    config = _config(folder, data, packed=True)
    config.dataset.in_batch_packing_pad_to_multiple_of = 4
    with pytest.raises(VisionInputError, match="words on each of the 2 ranks that share it"):
        ForkLauncher(2).all(_ours, folder, Layout(cp=2), config, _batches(config))
    with pytest.raises(
        UnsupportedLayout, match="cp is 2, and must be 1 where conversations with images are packed"
    ):
        recipe("exaone45_vl_33b_sft_config")(packed=True, gpus=32, cp=2)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="Transformers' videos need torchvision"
)
def test_videos(processor: Any) -> None:
    """Words, pixels and grids are the processor's own."""
    from PIL import Image

    from exaone_bridge.models.exaone45.collate import exaone45_collate

    frames = torch.randint(
        0, 255, (4, 3, 32, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    seen = _asked(
        {"type": "video", "video": frames}, {"type": "image", "image": Image.new("RGB", (32, 32))}
    )
    batch = exaone45_collate([seen], processor, sequence_length=256)
    text = processor.apply_chat_template(seen["conversation"], tokenize=False)
    expected = processor(
        text=[text], videos=[frames], images=[Image.new("RGB", (32, 32))], return_tensors="pt"
    )
    words = expected["input_ids"][0]
    assert torch.equal(batch["input_ids"][0, : len(words)], words)
    assert (
        int((words == processor.video_token_id).sum()) * 4
        == int(expected["video_grid_thw"].prod())
        > 0
    )
    for name in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw"):
        assert torch.equal(getattr(batch["visual_inputs"], name), expected[name]), name
