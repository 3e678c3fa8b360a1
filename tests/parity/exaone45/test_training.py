"""Gradients of EXAONE 4.5 against Transformers, images and text mixed, in fp32 on the CPU; what is frozen stays."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.exaone45_cases import batches, step_of_megatron, step_of_transformers
from tests.helpers.training import relative_difference

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(tp=2, pp=2),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
]


@pytest.fixture(scope="module")
def reference(megatron_bridge: Any, tiny: Any) -> tuple[float, dict[str, Any]]:
    return ForkLauncher(1).all(step_of_transformers, tiny("exaone45"), batches())[0]


def _compare(results: list[Any], reference: tuple[float, dict[str, Any]], trained: Any) -> None:
    loss, gradients = reference
    assert [found for found, _, _ in results if found is not None]
    for ours, found, _ in results:
        assert ours is None or abs(ours - loss) <= 1e-4
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            if trained(name):
                assert gradient.any(), name
                assert relative_difference(found[name], gradient) <= 1e-4, name
            else:
                assert not found[name].any(), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_every_parameter(
    megatron_bridge: Any, tiny: Any, reference: Any, layout: Layout
) -> None:
    """Prompts with one image, several, a video, none: the last has a gradient for the tower, of zero."""
    results = ForkLauncher(layout.ranks).all(
        step_of_megatron, tiny("exaone45"), layout, batches(), {}
    )
    _compare(results, reference, lambda name: True)


def test_recomputed(megatron_bridge: Any, tiny: Any, reference: Any) -> None:
    """Activations of language model and tower computed again in the backward pass."""
    again = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    _compare(
        ForkLauncher(1).all(step_of_megatron, tiny("exaone45"), Layout(), batches(), again),
        reference,
        lambda name: True,
    )


FROZEN = {
    "language model": ("freeze_language_model", lambda name: ".visual." not in name),
    "tower": ("freeze_vision_model", lambda name: ".visual." in name and ".merger." not in name),
    "merger": ("freeze_vision_projection", lambda name: ".merger." in name),
}


@pytest.mark.parametrize(
    ("which", "layout"),
    [*((which, Layout()) for which in FROZEN), ("language model", Layout(tp=2, sp=True))],
    ids=str,
)
def test_frozen(
    megatron_bridge: Any, tiny: Any, reference: Any, which: str, layout: Layout
) -> None:
    """Gradients flow through what is frozen to what is not, and only there."""
    switch, is_frozen = FROZEN[which]
    results = ForkLauncher(layout.ranks).all(
        step_of_megatron, tiny("exaone45"), layout, batches(), {switch: True}
    )
    assert all(frozen for _, _, frozen in results)
    _compare(results, reference, lambda name: not is_frozen(name))


def test_text_alone_trains_with_overlapped_reduction(megatron_bridge: Any, tiny: Any) -> None:
    """No image in the whole batch: the tower's gradients are there, and zero."""
    data = [(tokens, {}) for tokens, images in batches(8) if not images]
    ((_, expected),) = ForkLauncher(1).all(step_of_transformers, tiny("exaone45"), data)
    ((_, found, _),) = ForkLauncher(1).all(step_of_megatron, tiny("exaone45"), Layout(), data, {})
    assert not any(gradient.any() for name, gradient in found.items() if ".visual." in name)
    assert all(
        relative_difference(found[name], gradient) <= 1e-4 for name, gradient in expected.items()
    )


def _gradients_differ(results: list[Any], reference: tuple[float, dict[str, Any]]) -> bool:
    expected = {name: value for name, value in reference[1].items() if ".visual." in name}
    return any(
        relative_difference(found[name], expected[name]) > 1e-3
        for _, found, _ in results
        for name in expected
    )


def test_fault_gradients_of_cuts_not_summed(
    megatron_bridge: Any, tiny: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.models.exaone45 import provider

    right = provider.build_vision_encoder

    def unmarked(*args: Any) -> Any:
        vision_encoder = right(*args)
        for parameter in vision_encoder.parameters():
            parameter.sequence_parallel = False
        return vision_encoder

    monkeypatch.setattr(provider, "build_vision_encoder", unmarked)
    results = ForkLauncher(2).all(
        step_of_megatron, tiny("exaone45"), Layout(tp=2, sp=True), batches(), {}
    )
    assert _gradients_differ(results, reference)
