"""EXAONE 4.5 under Transformer Engine on one GPU: text, images, videos, MTP, training steps."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.tiny import write_random
from exaone_bridge.models.exaone45.config import read_hf_config
from exaone_bridge.models.exaone45.prompts import image_prompts
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from exaone_bridge.verification.workflow.workload import batch_images, random_prompts
from tests.helpers.bf16 import Distance, assert_bf16_close
from tests.helpers.exaone45 import CONFIG, image_batches
from tests.helpers.gpu import (
    BACKENDS,
    hf_logits,
    logits_of,
    long_prompts,
    megatron_logits,
    train_mixed_precision,
    wide,
)
from tests.helpers.mtp import mtp_of_megatron, mtp_of_reference, random_tokens
from tests.helpers.training import (
    assert_gradients_equal,
    full_sequence_step,
    to_device,
    train_megatron,
    train_transformers,
)

WIDE_CONFIG = CONFIG | wide("exaone45")


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Collect reference cycles after each test: they keep models of tens of gigabytes alive."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


# --- logits ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_logits_equal_those_of_transformers(nccl: None, tiny: Any, backend: str) -> None:
    folder = tiny("exaone45", **wide("exaone45"))
    runs = long_prompts(folder)
    assert all(tokens.shape[1] > 2 * 64 for tokens, _ in runs)  # longer than the window
    reference = hf_logits(folder, runs, torch.float32)
    text = runs[0][0].numel()
    difference = (megatron_logits(folder, runs, torch.float32, backend) - reference).abs()
    print(f"exaone45 {backend} fp32: text {difference[:text].max():.2e}", end=", ")
    print(f"images {difference[text:].max():.2e}")
    assert difference.max() <= 1e-3
    without_images = [(tokens, []) for tokens, _ in runs]
    logits = megatron_logits(folder, without_images, torch.float32, backend)
    assert (logits - reference)[text:].abs().max() > 1e-2


def test_bf16_logits_are_as_exact_as_those_of_transformers(nccl: None, tiny: Any) -> None:
    folder = tiny("exaone45", **wide("exaone45", "bfloat16"))
    runs = long_prompts(folder)
    reference = hf_logits(folder, runs, torch.float32)
    hf = hf_logits(folder, runs, torch.bfloat16)
    megatron = megatron_logits(folder, runs, torch.bfloat16)
    text = runs[0][0].numel()
    assert_bf16_close("exaone45 text", megatron[:text], hf[:text], reference[:text])
    assert_bf16_close("exaone45 images", megatron[text:], hf[text:], reference[text:])


def test_batch_of_text_images_and_video_equals_single_prompts(nccl: None, tiny: Any) -> None:
    """One forward pass runs prompts with and without images."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    folder = tiny("exaone45", **wide("exaone45"))
    tokens, images = image_prompts(read_hf_config(WIDE_CONFIG), 4, seed=5)
    order = [3, 1, 2, 0]
    tokens, images = tokens[order], [images[number] for number in order]
    expected = hf_logits(folder, [(tokens, images)], torch.float32)
    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(), backend="transformer_engine")
    ((batch, all_images),) = to_device([(tokens, batch_images(images))])
    positions = torch.arange(tokens.shape[1], device=batch.device)[None]
    with torch.no_grad():
        logits = model.eval()(batch, positions, None, **all_images)
    assert (logits.float().cpu().flatten(0, 1) - expected).abs().max() <= 1e-3


@pytest.mark.parametrize(("saved_by", "loaded_by"), [BACKENDS, BACKENDS[::-1]])
def test_megatron_checkpoint_loads_with_the_other_backend(
    nccl: None, tiny: Any, tmp_path: Path, saved_by: str, loaded_by: str
) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, load_megatron

    folder = tiny("exaone45", **wide("exaone45"))
    bridge = AutoBridge.from_hf_pretrained(folder)
    saved = build(bridge, Layout(), backend=saved_by, mtp_num_layers=1)
    bridge.save_megatron_model(saved, tmp_path / "megatron")
    loaded = load_megatron(bridge, tmp_path / "megatron", Layout(), backend=loaded_by)
    bridge.save_hf_pretrained(loaded, tmp_path / "exported", show_progress=False)
    check = compare_tensors(folder, tmp_path / "exported")
    assert check.passed, check.details
    runs = [image_prompts(read_hf_config(WIDE_CONFIG), 2, seed=5)]
    first, second = logits_of(saved, runs), logits_of(loaded, runs)
    assert first is not None and second is not None
    assert (first - second).abs().max() <= 1e-3


# --- multi-token prediction ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_mtp_equals_the_reference(nccl: None, tiny: Any, backend: str) -> None:
    folder, tokens = tiny("exaone45", **wide("exaone45")), random_tokens(512, 2, 201)
    reference = mtp_of_reference(folder, tokens, 1)
    result = mtp_of_megatron(folder, Layout(), tokens, 1, {"backend": backend})
    assert not result.differing
    difference = (result.logits[0] - reference.logits[0])[:, :-1].abs().max().item()
    loss = abs(result.losses[0] - reference.losses[0])
    print(f"MTP, {backend} fp32: logits {difference:.2e}, loss {loss:.1e}")
    assert difference <= 1e-3 and loss <= 1e-4
    assert_gradients_equal(result.gradients, reference.gradients, tolerance=1e-3)
    mtp = [name for name in reference.gradients if name.startswith("mtp.")]
    assert all(result.gradients[name].any() for name in mtp)
    overrides = {"backend": backend, "mtp_sliding": False}
    other = mtp_of_megatron(folder, Layout(), tokens, 1, overrides)
    assert (other.logits[0] - reference.logits[0])[:, :-1].abs().max() > 1e-2


def test_bf16_mtp_is_as_exact_as_the_reference(nccl: None, tiny: Any) -> None:
    folder = tiny("exaone45", **wide("exaone45", "bfloat16"))
    tokens = random_tokens(512, 8, 301)
    fp32 = mtp_of_reference(folder, tokens, 1)
    bf16 = mtp_of_reference(folder, tokens, 1, dtype=torch.bfloat16)
    overrides = {"backend": "transformer_engine"}
    result = mtp_of_megatron(folder, Layout(), tokens, 1, overrides, torch.bfloat16)
    losses = [side.losses[0] for side in (fp32, bf16, result)]
    print("losses of fp32, bf16, Megatron-Core:", losses)
    assert_bf16_close("MTP", *(side.logits[0][:, :-1] for side in (result, bf16, fp32)))
    assert abs(losses[2] - losses[0]) <= max(1.1 * abs(losses[1] - losses[0]), 2e-3)


# --- training ---


@pytest.mark.parametrize("recompute", [False, True])
def test_fp32_gradients_equal_those_of_transformers(nccl: None, tiny: Any, recompute: bool) -> None:
    """Some prompts have images; the second case recomputes all activations."""
    folder, batches = tiny("exaone45", **wide("exaone45")), image_batches(config=WIDE_CONFIG)
    reference = train_transformers(folder, batches)
    overrides: dict[str, Any] = {"backend": "transformer_engine"}
    if recompute:
        overrides |= {"recompute_granularity": "full", "recompute_method": "uniform"}
        overrides["recompute_num_layers"] = 1
    run = train_megatron(folder, Layout(), batches, forward_step=full_sequence_step, **overrides)
    assert abs(run.losses[0] - reference.losses[0]) <= 1e-4
    assert all(value.any() for value in reference.gradients.values())
    assert_gradients_equal(run.gradients, reference.gradients, tolerance=1e-3)


def published(layers: int, blocks: int, **text: Any) -> dict[str, Any]:
    """Return the config of EXAONE-4.5-33B with MTP and fewer layers.

    Args:
        layers: the number of layers; the end of the published layer pattern stays.
        blocks: the number of blocks of the vision encoder, the last with full attention.
        text: further fields of the language model.
    """
    config = CONFIGS["exaone45_33b"]
    fields = {
        "num_hidden_layers": layers,
        "layer_types": config["text_config"]["layer_types"][-layers:],
        "num_nextn_predict_layers": 1,
        "mtp_share_layers": True,
        "mtp_loss_scaling_factor": 0.1,
    }
    language = config["text_config"] | fields | text
    vision = config["vision_config"] | {"depth": blocks, "fullatt_block_indexes": [blocks - 1]}
    return config | {"text_config": language, "vision_config": vision}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return folder and config of two layers, one with full attention, at the published widths."""
    config = published(2, 3, sliding_window=256)
    folder = tmp_path_factory.mktemp("published") / "model"
    write_random(folder, config)
    return folder, config


def test_logits_at_published_widths(nccl: None, large: tuple[Path, dict[str, Any]]) -> None:
    """Transformer Engine chooses its kernels by width."""
    folder, config = large
    model_config = read_hf_config(config)
    runs = [
        (random_prompts(model_config.vocab_size, 1, 600), []),
        image_prompts(model_config, 3, seed=3),
    ]
    reference = hf_logits(folder, runs, torch.float32)
    distance = Distance.between(megatron_logits(folder, runs, torch.float32), reference)
    print(f"exaone45 published widths fp32: {distance}")
    assert distance.max <= 1e-3
    megatron = megatron_logits(folder, runs, torch.bfloat16)
    hf = hf_logits(folder, runs, torch.bfloat16)
    assert_bf16_close("exaone45 published widths", megatron, hf, reference)


FROZEN = ("freeze_vision_model", "freeze_language_model")


@pytest.mark.parametrize("frozen", [(), FROZEN], ids=["all", "merger and MTP"])
def test_mixed_precision_trains_all_parameters_that_are_not_frozen(
    nccl: None, large: tuple[Path, dict[str, Any]], frozen: tuple[str, ...]
) -> None:
    """Their gradients are finite and not zero; losses fall; frozen parameters do not change."""
    folder, config = large
    torch.cuda.reset_peak_memory_stats()
    before: dict[str, torch.Tensor] = {}
    trained: set[str] = set()  # with gradients that are finite and not zero
    without: set[str] = set()

    def keep_first_step(step: int, model: Any) -> None:
        if step == 0:
            for name, parameter in model.named_parameters():
                before[name] = parameter.detach().cpu().clone()
                gradient = getattr(parameter, "main_grad", None)
                if gradient is None:
                    without.add(name)
                elif gradient.isfinite().all() and gradient.any():
                    trained.add(name)

    losses, model = train_mixed_precision(
        folder,
        [image_batches(config=config)] * 4,
        optimizer={"lr": 3e-5, "min_lr": 3e-5, "clip_grad": 1.0},
        before_update=keep_first_step,
        mtp_num_layers=1,
        backend="transformer_engine",
        **dict.fromkeys(frozen, True),
    )
    print(f"losses {losses}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    expected = {name for name in before if not frozen or ".merger." in name or ".mtp." in name}
    assert expected and trained == expected
    assert without == before.keys() - expected
    changed = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.detach().cpu(), before[name])
    }
    # A bf16 norm weight near one may be too large for a step to change it; no matrix is.
    matrices = {name for name in trained if before[name].ndim > 1}
    assert matrices <= changed <= trained
