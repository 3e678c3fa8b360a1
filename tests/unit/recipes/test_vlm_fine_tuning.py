"""Fine-tuning on conversations with images: loss and gradients equal those of Transformers.

Megatron-Bridge's datasets, our collate function and Megatron-Bridge's `vlm_step` are compared with
Transformers on the same conversations, in fp32 on the CPU.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from exaone_bridge.errors import UnsupportedLayout, VisionInputError
from exaone_bridge.recipes import exaone45_vl_33b_sft_config, exaone45_vl_tiny_sft_config
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.gradients import relative_norm
from tests.helpers.paths import ROOT
from tests.helpers.processors import load_processor
from tests.helpers.training import StragglerTimer

EXAMPLES = str(ROOT / "examples")
LENGTH = 128
# The samples of each batch. The first batch has a sample without images and one with two; the last
# has no images.
BATCHES = [(0, 1), (2, 3), (4, 5), (0, 5)]


@dataclass(frozen=True)
class Line:
    """A line of training.jsonl, read without Megatron-Bridge."""

    images: list[Path]
    question: str
    answer: str


@pytest.fixture(scope="module")
def hf_path(tiny: Any) -> Path:
    return tiny("exaone45")


@pytest.fixture(scope="module")
def dataset_root(megatron_bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images and questions about them, as `examples/sft_images.py` draws them."""
    sys.path.insert(0, EXAMPLES)
    import sft_images

    root = tmp_path_factory.mktemp("data") / "images"
    sft_images.write_images(root, training=10, validation=5)
    yield root
    sys.path.remove(EXAMPLES)
    for name in ("common", "data", "sft_images"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def processor(megatron_bridge: Any, hf_path: Path) -> Any:
    return load_processor(hf_path)


@pytest.fixture
def loads_processor(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Bridge loads this processor."""
    from transformers import AutoProcessor

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)


def _build_config(hf_path: Path, dataset_root: Path, *, packed: bool = False) -> Any:
    return exaone45_vl_tiny_sft_config(
        hf_path=hf_path,
        dataset_root=dataset_root,
        packed=packed,
        seq_length=LENGTH,
        micro_batch_size=2,
        global_batch_size=4,
    )


def _load_batches(config: Any) -> list[dict[str, Any]]:
    """Build the training split as Megatron-Bridge's loop does, and collate `BATCHES`."""
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.bridge.data.builders import DirectHFSFTDatasetBuilder

    config.dataset.finalize()
    context = DatasetBuildContext(10, 5, 0)
    training, validation, test = DirectHFSFTDatasetBuilder(config.dataset).build(context)
    assert len(training) == 10 and len(validation) == 5 and test is None
    return [training.collate_fn([training[index] for index in batch]) for batch in BATCHES]


def _read_lines(dataset_root: Path) -> list[Line]:
    lines = []
    for text in (dataset_root / "training.jsonl").read_text().splitlines():
        user, assistant = (turn["content"] for turn in json.loads(text)["messages"])
        images = [dataset_root / part["path"] for part in user[:-1]]
        lines.append(Line(images, user[-1]["text"], assistant[0]["text"]))
    return lines


def _transformers_step(hf_path: Path, dataset_root: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' mean loss per answer token and its gradients, with prompts written out here."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(hf_path)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(hf_path)
    model = AutoModelForImageTextToText.from_pretrained(
        hf_path, dtype=torch.float32, attn_implementation="eager"
    ).train()
    lines = _read_lines(dataset_root)
    losses = []
    for line in (lines[index] for batch in BATCHES for index in batch):
        images = [Image.open(path) for path in line.images]
        inputs = image_processor(images, return_tensors="pt") if images else {}
        counts = [int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", ())]
        vision = "".join(f"<vision>{'<|image_pad|>' * count}</vision>" for count in counts)
        prompt = f"[|user|]\n{vision}{line.question}[|endofturn|]\n[|assistant|]\n"
        before = tokenizer(prompt, return_tensors="pt")["input_ids"]
        after = tokenizer(f"{line.answer}[|endofturn|]", return_tensors="pt")["input_ids"]
        logits = model(torch.cat((before, after), 1), use_cache=False, **inputs).logits
        answer_logits = logits[0, before.shape[1] - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(answer_logits, after[0], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    parameters = model.named_parameters()
    return loss.item(), {name: p.grad for name, p in parameters if p.grad is not None}


def _megatron_step(
    hf_path: Path, layout: Layout, config: Any, batches: list[dict[str, Any]]
) -> tuple[float | None, dict[str, torch.Tensor]]:
    """On a rank: loss and gradients through `vlm_step` and Megatron-Core's schedule."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.vlm_step import forward_step
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    bridge = AutoBridge.from_hf_pretrained(hf_path)
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
    (model,) = provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=True)
    get_model_config(model).finalize_model_grads_func = finalize_model_grads
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    state = SimpleNamespace(
        cfg=config, timers=lambda *_, **__: timer, straggler_timer=StragglerTimer()
    )
    model.train()
    model.zero_grad_buffer()
    outputs = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, state),
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    loss = None
    if outputs:  # on the last pipeline stage
        total_and_count = sum(output["lm loss"] for output in outputs)
        torch.distributed.all_reduce(
            total_and_count, group=parallel_state.get_context_parallel_group()
        )
        loss = (total_and_count[0] / total_and_count[1]).item()
    with torch.no_grad():  # export the gradients in the place of the weights
        for parameter in model.parameters():
            grad = parameter.main_grad if parameter.requires_grad else 0.0
            parameter.data.copy_(torch.as_tensor(grad))
    weights = bridge.export_hf_weights([model], cpu=True, show_progress=False)
    return loss, {name: value.clone() for name, value in weights if not name.startswith("mtp.")}


@pytest.fixture(scope="module")
def reference(
    megatron_bridge: Any, hf_path: Path, dataset_root: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    return ForkLauncher(1).first(_transformers_step, hf_path, dataset_root)


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
def test_loss_and_gradients_equal_transformers(
    hf_path: Path,
    dataset_root: Path,
    loads_processor: None,
    reference: Any,
    layout: Layout,
    packed: bool,
) -> None:
    """The vision encoder is frozen; its merger and the language model are trained."""
    config = _build_config(hf_path, dataset_root, packed=packed)
    batches = _load_batches(config)
    expected_loss, expected = reference
    results = ForkLauncher(layout.ranks).all(_megatron_step, hf_path, layout, config, batches)
    losses = [loss for loss, _ in results if loss is not None]
    assert losses and all(abs(loss - expected_loss) <= 1e-4 for loss in losses)
    for _, gradients in results:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            if ".visual." in name and ".merger." not in name:
                assert not gradients[name].any(), name
            else:
                assert gradient.any(), name
                assert relative_norm(gradients[name], gradient) <= 1e-4, name


def test_loss_of_wrong_labels_or_images_differs(
    hf_path: Path, dataset_root: Path, loads_processor: None, reference: Any
) -> None:
    """The comparison above fails for a loss on questions, and for images in the wrong order."""
    config = _build_config(hf_path, dataset_root)
    batches = _load_batches(config)
    for batch in batches:
        batch["labels"] = torch.nn.functional.pad(batch["input_ids"][:, 1:], (0, 1))
        batch["loss_mask"] = batch["attention_mask"].float()
    unmasked, _ = ForkLauncher(1).first(_megatron_step, hf_path, Layout(), config, batches)
    batches = _load_batches(config)
    visual = batches[1]["visual_inputs"]
    visual.pixel_values = visual.pixel_values.flip(0)
    swapped, _ = ForkLauncher(1).first(_megatron_step, hf_path, Layout(), config, batches)
    assert min(abs(unmasked - reference[0]), abs(swapped - reference[0])) > 1e-3


def test_loss_mask_covers_answers_and_their_end_token(
    hf_path: Path, dataset_root: Path, processor: Any, loads_processor: None
) -> None:
    lines = _read_lines(dataset_root)
    batches = _load_batches(_build_config(hf_path, dataset_root))
    for indices, batch in zip(BATCHES, batches, strict=True):
        assert batch["input_ids"].shape == batch["labels"].shape == (2, LENGTH)
        for row, index in enumerate(indices):
            line, input_ids, labels = lines[index], batch["input_ids"][row], batch["labels"][row]
            in_loss = labels != -100
            assert torch.equal(in_loss, batch["loss_mask"][row] > 0)
            answer = processor.tokenizer.decode(labels[in_loss])
            assert answer == f"{line.answer}[|endofturn|]"
            text = processor.tokenizer.decode(input_ids)
            assert text.count("<vision>") == text.count("</vision>") == len(line.images)
            assert text.count("<|image_pad|>") == 16 * len(line.images)
            assert line.question in text
            # Each token is the label of the one before it.
            assert torch.equal(labels[in_loss], input_ids.roll(-1)[in_loss])
        assert (batch["visual_inputs"].pixel_values is None) == (indices == (0, 5))


def test_packed_sequences_with_context_parallelism_raise(
    hf_path: Path, dataset_root: Path, loads_processor: None
) -> None:
    config = _build_config(hf_path, dataset_root, packed=True)
    config.dataset.in_batch_packing_pad_to_multiple_of = 4
    with pytest.raises(VisionInputError, match="each of the 2 context-parallel ranks has all"):
        ForkLauncher(2).all(_megatron_step, hf_path, Layout(cp=2), config, _load_batches(config))
    with pytest.raises(
        UnsupportedLayout, match="cp is 2, and must be 1 where conversations with images are packed"
    ):
        exaone45_vl_33b_sft_config(packed=True, gpus=32, cp=2)
