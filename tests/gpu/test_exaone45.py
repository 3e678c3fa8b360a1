"""EXAONE 4.5 under Transformer Engine on one GPU: text, images, videos, multi-token prediction, training steps."""

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
from exaone_bridge.verification.checks.logits import prompts
from tests.helpers.exaone45_cases import (
    CONFIG,
    Images,
    batches,
    changed,
    forward_backward,
    moved,
    step_of_transformers,
)
from tests.helpers.exaone45_mtp import formula, ours, prompts_of
from tests.helpers.training import relative_difference

BACKENDS = ["transformer_engine", "torch"]


def wide45(dtype: str = "float32", **fields: Any) -> dict[str, Any]:
    """Widths that Transformer Engine's kernels take: multiples of 16, heads of 64; a window shorter than prompts."""
    return changed(
        dtype=dtype,
        text_config__dtype=dtype,
        text_config__head_dim=64,
        text_config__hidden_size=256,
        text_config__intermediate_size=512,
        text_config__vocab_size=512,
        text_config__max_position_embeddings=1024,
        text_config__sliding_window=64,
        vision_config__dtype=dtype,
        vision_config__hidden_size=128,
        vision_config__intermediate_size=192,
        vision_config__out_hidden_size=256,
        **fields,
    )


def runs_of(config: dict[str, Any]) -> list[tuple[torch.Tensor, list[Images]]]:
    """Prompts [N, S] with their images: words alone, past the window; then one image, several, a video, none, twice."""
    model_config = read_hf_config(config)
    return [(prompts(model_config.vocab_size, 4, 300), []), image_prompts(model_config, 8, seed=3)]


def theirs_of(
    folder: Path, runs: list[tuple[torch.Tensor, list[Images]]], dtype: torch.dtype
) -> torch.Tensor:
    """Transformers' eager logits of every position of every prompt, [positions, V] fp32."""
    from exaone_bridge.verification.workflow.transformers import load

    model, found = load(folder, dtype), []
    for tokens, images in runs:
        for prompt, each in moved(
            list(zip(tokens.split(1), images or [{}] * len(tokens), strict=True))
        ):
            with torch.no_grad():
                found.append(model(prompt, use_cache=False, **each).logits[0].float().cpu())
    return torch.cat(found)


def ours_of(
    folder: Path,
    runs: list[tuple[torch.Tensor, list[Images]]],
    dtype: torch.dtype,
    backend: str = "transformer_engine",
    **overrides: Any,
) -> torch.Tensor:
    """The same by Megatron-Core on one rank."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, Layout(), dtype=dtype, backend=backend, **overrides)
    found = [forward_logits(model, tokens, images)[0] for tokens, images in runs]
    return torch.cat([logits.flatten(0, 1) for logits in found if logits is not None])


def assert_as_close(
    ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, what: str
) -> None:
    """The rule of bf16: no farther from fp32 than 1.1 times Transformers' own, in the mean and at most."""
    mine, own = (ours - truth).abs(), (theirs - truth).abs()
    print(
        f"{what} bf16: ours {mine.mean():.3e} / {mine.max():.3e}, theirs {own.mean():.3e} / {own.max():.3e}"
    )
    assert mine.mean() <= 1.1 * own.mean()
    assert mine.max() <= 1.1 * own.max()


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Models of a test that has ended hold tens of gigabytes until cycles are collected."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_logits(nccl: None, tiny: Any, backend: str) -> None:
    folder, runs = tiny("exaone45", **wide45()), runs_of(CONFIG | wide45())
    assert all(tokens.shape[1] > 2 * 64 for tokens, _ in runs)  # past the window
    truth = theirs_of(folder, runs, torch.float32)
    apart = (ours_of(folder, runs, torch.float32, backend) - truth).abs()
    text = runs[0][0].numel()
    print(
        f"exaone45 {backend} fp32: text max {apart[:text].max():.2e}, with images {apart[text:].max():.2e}"
    )
    assert apart.max() <= 1e-3
    blind = [(tokens, []) for tokens, _ in runs]  # the same words, and nothing in their places
    assert (ours_of(folder, blind, torch.float32, backend) - truth)[text:].abs().max() > 1e-2


def test_bf16_logits_are_as_close_to_the_truth_as_transformers_own(nccl: None, tiny: Any) -> None:
    folder, runs = tiny("exaone45", **wide45("bfloat16")), runs_of(CONFIG | wide45())
    truth = theirs_of(folder, runs, torch.float32)
    theirs, mine = theirs_of(folder, runs, torch.bfloat16), ours_of(folder, runs, torch.bfloat16)
    text = runs[0][0].numel()
    assert_as_close(mine[:text], theirs[:text], truth[:text], "exaone45 text")
    assert_as_close(mine[text:], theirs[text:], truth[text:], "exaone45 images")


def test_one_batch_of_text_images_and_video(nccl: None, tiny: Any) -> None:
    """Samples without images beside samples with some, in one forward pass."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build
    from exaone_bridge.verification.workflow.transformers import together

    folder = tiny("exaone45", **wide45())
    tokens, images = image_prompts(read_hf_config(CONFIG | wide45()), 4, seed=5)
    order = [3, 1, 2, 0]
    tokens, images = tokens[order], [images[number] for number in order]
    expected = theirs_of(folder, [(tokens, images)], torch.float32)
    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(), backend="transformer_engine")
    ((batch, pictures),) = moved([(tokens, together(images))])
    with torch.no_grad():
        found = model.eval()(
            batch, torch.arange(tokens.shape[1], device=batch.device)[None], None, **pictures
        )
    assert (found.float().cpu().flatten(0, 1) - expected).abs().max() <= 1e-3


@pytest.mark.parametrize(("written", "read"), [BACKENDS, BACKENDS[::-1]])
def test_megatron_checkpoint_changes_backend(
    nccl: None, tiny: Any, tmp_path: Path, written: str, read: str
) -> None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits, load_megatron

    folder = tiny("exaone45", **wide45())
    bridge = AutoBridge.from_hf_pretrained(folder)
    saved = build(bridge, Layout(), backend=written, mtp_num_layers=1)
    bridge.save_megatron_model(saved, tmp_path / "megatron")
    loaded = load_megatron(bridge, tmp_path / "megatron", Layout(), backend=read)
    bridge.save_hf_pretrained(loaded, tmp_path / "exported", show_progress=False)
    check = compare_tensors(folder, tmp_path / "exported")
    assert check.passed, check.details
    tokens, images = image_prompts(read_hf_config(CONFIG | wide45()), 2, seed=5)
    first, second = (forward_logits(model, tokens, images)[0] for model in (saved, loaded))
    assert first is not None and second is not None and (first - second).abs().max() <= 1e-3


# --- multi-token prediction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_prediction_in_fp32(nccl: None, tiny: Any, backend: str) -> None:
    """Logits within 1e-3 and losses within 1e-4 of the formula's, every gradient within 1e-3 of its size."""
    folder, whole = tiny("exaone45", **wide45()), prompts_of(512, 2, 201)
    expected = formula(folder, whole, 1)
    found = ours(folder, Layout(), whole, 1, {"backend": backend})
    assert not found.differing
    apart = (found.logits[0] - expected.logits[0])[:, :-1].abs().max().item()
    losses = abs(found.losses[0] - expected.losses[0])
    worst = max(
        expected.gradients, key=lambda name: _gap(found.gradients, expected.gradients, name)
    )
    gap = _gap(found.gradients, expected.gradients, worst)
    print(
        f"prediction, {backend} fp32: logits {apart:.2e}, loss {losses:.1e}, gradient of {worst} {gap:.1e}"
    )
    assert apart <= 1e-3 and losses <= 1e-4 and gap <= 1e-3
    assert all(
        found.gradients[name].any() for name in expected.gradients if name.startswith("mtp.")
    )
    other = ours(
        folder, Layout(), whole, 1, {"backend": backend, "mtp_windowed": False}
    )  # the check can fail
    assert (other.logits[0] - expected.logits[0])[:, :-1].abs().max() > 1e-2


def test_prediction_in_bf16(nccl: None, tiny: Any) -> None:
    folder, whole = tiny("exaone45", **wide45("bfloat16")), prompts_of(512, 8, 301)
    truth = formula(folder, whole, 1)
    half = formula(folder, whole, 1, dtype=torch.bfloat16)
    found = ours(folder, Layout(), whole, 1, {"backend": "transformer_engine"}, torch.bfloat16)
    print(
        f"losses: fp32 {truth.losses[0]:.5f}, formula in bf16 {half.losses[0]:.5f}, ours {found.losses[0]:.5f}"
    )
    mine, own, expected = (side.logits[0][:, :-1] for side in (found, half, truth))
    assert_as_close(mine, own, expected, "prediction")
    assert abs(found.losses[0] - truth.losses[0]) <= max(
        1.1 * abs(half.losses[0] - truth.losses[0]), 2e-3
    )


# --- training -------------------------------------------------------------------------------------------------------


def _gap(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> float:
    return relative_difference(found[name], expected[name])


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_every_parameter(nccl: None, tiny: Any, recompute: bool) -> None:
    """Images and words mixed, in fp32; with the activations of both towers computed again too."""
    folder, data = tiny("exaone45", **wide45()), batches(config=CONFIG | wide45())
    loss, gradients = step_of_transformers(folder, data)
    again = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    overrides = {"backend": "transformer_engine"} | (again if recompute else {})
    mine, found, _ = forward_backward(folder, Layout(), data, overrides)
    worst = max(gradients, key=lambda name: _gap(found, gradients, name))
    print(
        f"gradients: the worst of {len(gradients)} is {worst}, {_gap(found, gradients, worst):.1e}"
    )
    assert mine is not None and abs(mine - loss) <= 1e-4
    assert (
        all(gradient.any() for gradient in gradients.values())
        and _gap(found, gradients, worst) <= 1e-3
    )


def published(layers: int, blocks: int, **text: Any) -> dict[str, Any]:
    """EXAONE-4.5-33B with the last layers of its language model, and so many blocks of its tower, the last one global;
    with its multi-token prediction, as the published folder has it."""
    config = CONFIGS["exaone45_33b"]
    kinds = config["text_config"]["layer_types"][-layers:]
    prediction = {
        "num_nextn_predict_layers": 1,
        "mtp_share_layers": True,
        "mtp_loss_scaling_factor": 0.1,
    }
    language = (
        config["text_config"]
        | {"num_hidden_layers": layers, "layer_types": kinds}
        | prediction
        | text
    )
    vision = config["vision_config"] | {"depth": blocks, "fullatt_block_indexes": [blocks - 1]}
    return config | {"text_config": language, "vision_config": vision}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Published widths: two layers, the second global; three blocks of the tower; a window that prompts exceed."""
    config = published(2, 3, sliding_window=256)
    folder = tmp_path_factory.mktemp("published") / "model"
    write_random(folder, config)
    return folder, config


def test_published_widths(nccl: None, large: tuple[Path, dict[str, Any]]) -> None:
    """Kernels are chosen by width: fp32 within 1e-3, bf16 as close to the truth as Transformers' own."""
    folder, config = large
    model_config = read_hf_config(config)
    runs = [(prompts(model_config.vocab_size, 1, 600), []), image_prompts(model_config, 3, seed=3)]
    truth = theirs_of(folder, runs, torch.float32)
    exact = (ours_of(folder, runs, torch.float32) - truth).abs()
    print(f"exaone45 published widths fp32: {exact.max():.2e}")
    assert exact.max() <= 1e-3
    theirs, mine = theirs_of(folder, runs, torch.bfloat16), ours_of(folder, runs, torch.bfloat16)
    assert_as_close(mine, theirs, truth, "exaone45 published widths")


def _trained(folder: Path, config: dict[str, Any], steps: int, **overrides: Any) -> dict[str, Any]:
    """Steps of bf16 training with fp32 main weights and gradients, multi-token prediction on: losses; parameters whose
    gradient has a NaN, or is zero, at the first step; and those that changed."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    settings = OptimizerConfig(
        lr=3e-5, min_lr=3e-5, weight_decay=0.0, clip_grad=1.0, use_distributed_optimizer=True
    )
    wrapper = DistributedDataParallelConfig(use_distributed_optimizer=True)
    get_mixed_precision_config("bf16_mixed").setup(provider, settings, wrapper)
    for name, value in (overrides | {"mtp_num_layers": 1, "backend": "transformer_engine"}).items():
        setattr(provider, name, value)
    provider.finalize()
    model = provider.provide_distributed_model(ddp_config=wrapper)
    core = get_model_config(model[0])
    core.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(settings, model)
    core.grad_scale_func = optimizer.scale_loss
    data = moved(batches(config=config))
    positions = torch.arange(data[0][0].shape[1] - 1, device="cuda")[None]
    before = {name: value.detach().cpu().clone() for name, value in model[0].named_parameters()}

    def forward_step(iterator: Any, chunk: Any) -> Any:
        tokens, images = next(iterator)
        output = chunk(
            tokens[:, :-1].contiguous(),
            positions,
            None,
            labels=tokens[:, 1:].contiguous(),
            **images,
        )
        return output, lambda loss: (loss.float().mean(), {"loss": loss.detach().float().mean()})

    losses: list[float] = []
    found: dict[str, Any] = {"losses": losses}
    for step in range(steps):
        model[0].train()
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        done = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(data),
            model=model[0],
            num_microbatches=len(data),
            seq_length=positions.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        if step == 0:
            gradients = {
                name: value.main_grad
                for name, value in model[0].named_parameters()
                if hasattr(value, "main_grad")
            }
            found["without"] = {name for name in before if name not in gradients}
            found["broken"] = {
                name for name, value in gradients.items() if not value.isfinite().all()
            }
            found["zero"] = {name for name, value in gradients.items() if not value.any()}
        updated, _, _ = optimizer.step()
        assert updated
        losses.append(torch.stack([item["loss"] for item in done]).mean().item())
    found["changed"] = {
        name
        for name, value in model[0].named_parameters()
        if not torch.equal(value.detach().cpu(), before[name])
    }
    found["all"], found["matrices"] = (
        set(before),
        {name for name, value in before.items() if value.ndim > 1},
    )
    return found


PART = (
    "freeze_vision_model",
    "freeze_language_model",
)  # the merger and multi-token prediction learn


@pytest.mark.parametrize("frozen", [(), PART], ids=["all", "part"])
def test_published_widths_train(
    nccl: None, large: tuple[Path, dict[str, Any]], frozen: tuple[str, ...]
) -> None:
    """Gradients are where they should be, finite, and nowhere else; what is frozen stays bit by bit; losses fall."""
    folder, config = large
    torch.cuda.reset_peak_memory_stats()
    found = _trained(folder, config, 4, **dict.fromkeys(frozen, True))
    print(f"losses {found['losses']}, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    assert (
        all(math.isfinite(loss) for loss in found["losses"])
        and found["losses"][-1] < found["losses"][0]
    )
    learns = {name for name in found["all"] if not frozen or ".merger." in name or ".mtp." in name}
    assert learns and found["without"] == found["all"] - learns
    assert found["broken"] == set() and found["zero"] == set()
    # A bf16 scale near one keeps its bits where a step is too small for them; some of a matrix are small enough.
    assert found["changed"] <= learns and learns & found["matrices"] <= found["changed"]
