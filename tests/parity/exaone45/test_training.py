"""Gradients of EXAONE 4.5 with and without images against Transformers, in fp32 on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.exaone45 import image_batches
from tests.helpers.layouts import LAYOUTS
from tests.helpers.training import (
    Batches,
    TrainingRun,
    assert_gradients_equal,
    full_sequence_step,
    train_megatron,
    train_transformers,
)


@pytest.fixture(scope="module")
def reference(megatron_bridge: Any, tiny: Any) -> TrainingRun:
    return ForkLauncher().first(train_transformers, tiny("exaone45"), image_batches())


def _train(
    folder: Any, layout: Layout, batches: Batches | None = None, **overrides: Any
) -> list[TrainingRun]:
    step = functools.partial(train_megatron, forward_step=full_sequence_step, **overrides)
    return ForkLauncher(layout.ranks).all(step, folder, layout, batches or image_batches())


def _assert_equal(
    runs: list[TrainingRun],
    reference: TrainingRun,
    is_frozen: Callable[[str], bool] = lambda name: False,
) -> None:
    assert any(run.losses for run in runs)
    trained = {name: value for name, value in reference.gradients.items() if not is_frozen(name)}
    assert all(gradient.any() for gradient in trained.values())
    for run in runs:
        assert all(abs(loss - reference.losses[0]) <= 1e-4 for loss in run.losses)
        found = {name for name in run.gradients if not name.startswith("mtp.")}  # passthrough
        assert found == reference.gradients.keys()
        assert_gradients_equal(run.gradients, trained)
        assert not any(run.gradients[name].any() for name in found - trained.keys())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_at_each_layout_equal_those_of_transformers(
    megatron_bridge: Any, tiny: Any, reference: TrainingRun, layout: Layout
) -> None:
    """The last prompt has no image: its gradients of the vision encoder are zero, not missing."""
    _assert_equal(_train(tiny("exaone45"), layout), reference)


def test_gradients_with_recomputed_activations(
    megatron_bridge: Any, tiny: Any, reference: TrainingRun
) -> None:
    """Language model and vision encoder recompute all activations in the backward pass."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform"}
    runs = _train(tiny("exaone45"), Layout(), **recompute, recompute_num_layers=1)
    _assert_equal(runs, reference)


FREEZE: dict[str, Callable[[str], bool]] = {
    "freeze_language_model": lambda name: ".visual." not in name,
    "freeze_vision_model": lambda name: ".visual." in name and ".merger." not in name,
    "freeze_vision_projection": lambda name: ".merger." in name,
}


@pytest.mark.parametrize(
    ("switch", "layout"),
    [*((switch, Layout()) for switch in FREEZE), ("freeze_language_model", Layout(tp=2, sp=True))],
    ids=str,
)
def test_frozen_parts_have_no_gradient(
    megatron_bridge: Any, tiny: Any, reference: TrainingRun, switch: str, layout: Layout
) -> None:
    """Gradients flow through the frozen part to all other parameters."""
    runs = _train(tiny("exaone45"), layout, **{switch: True})
    assert all(run.frozen for run in runs)
    _assert_equal(runs, reference, FREEZE[switch])


def test_gradients_of_the_vision_encoder_are_zero_without_images(
    megatron_bridge: Any, tiny: Any
) -> None:
    """No prompt has an image, and the reduction of gradients overlaps with the backward pass."""
    text = [(tokens, images) for tokens, images in image_batches(8) if not images]
    reference = ForkLauncher().first(train_transformers, tiny("exaone45"), text)
    (run,) = _train(tiny("exaone45"), Layout(), text)
    vision = [name for name in run.gradients if ".visual." in name]
    assert vision and not any(run.gradients[name].any() for name in vision)
    assert_gradients_equal(run.gradients, reference.gradients)


def test_gradients_differ_if_sequence_shards_are_not_summed(
    megatron_bridge: Any, tiny: Any, reference: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.models.exaone45 import provider

    original = provider.build_vision_encoder

    def unmarked(*args: Any) -> Any:
        vision_encoder = original(*args)
        for parameter in vision_encoder.parameters():
            parameter.sequence_parallel = False
        return vision_encoder

    monkeypatch.setattr(provider, "build_vision_encoder", unmarked)
    vision = {name: value for name, value in reference.gradients.items() if ".visual." in name}
    for run in _train(tiny("exaone45"), Layout(tp=2, sp=True)):
        with pytest.raises(AssertionError):
            assert_gradients_equal(run.gradients, vision, tolerance=1e-3)
