"""Figures, bounds and places: equal sides hold, and every difference that is planted is seen where it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.verification.activations.capture import Activations, routing_weights
from exaone_bridge.verification.activations.locate import CAUSES, locate
from exaone_bridge.verification.activations.probe_points import LOGITS, Capture, probe_points
from exaone_bridge.verification.checks.logits import (
    compare_activations,
    compare_half_precision,
    compare_logits,
    prompts,
)
from exaone_bridge.verification.checks.precision import CEILING, UNIT_ROUNDOFF, RoundingModel
from exaone_bridge.verification.report.report import ActivationDiff
from exaone_bridge.verification.workflow.job import prompt_length
from exaone_bridge.verification.workflow.transformers import capture_transformers, load

NAMES = ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b", "ernie45-dense"]


def copy_of(run: Activations) -> Activations:
    return Activations(
        run.logits.clone(), {name: value.clone() for name, value in run.values.items()}
    )


@pytest.fixture(scope="module")
def run(tiny: Any) -> tuple[Any, tuple[Any, ...], Activations]:
    """Facts, points and Transformers' run of the hybrid miniature."""
    source = HFCheckpoint.open(tiny("exaone4"))
    points = probe_points(source.mappings)
    return (
        source.model_config,
        points,
        capture_transformers(load(source.folder, torch.float32), points, prompts(387, 2, 21)),
    )


def places(run: Any, ours: Activations) -> tuple[ActivationDiff, ...]:
    model_config, points, reference = run
    return compare_activations(points, [reference], [ours], model_config)


# --- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_place_of_every_layer_is_on_both_sides(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    """The table comes from the rows alone, and each of its modules is there in both models."""
    from exaone_bridge.runtime.fork import ForkLauncher

    source = HFCheckpoint.open(tiny(name))
    points = probe_points(source.mappings)
    found = ForkLauncher(1).all(_seen_by_megatron, source.folder, points)[0]
    modules = dict(load(source.folder, torch.float32).named_modules())
    assert {point.hf for point in points} == found
    assert {point.hf for point in points} <= modules.keys()
    assert {point.layer for point in points} == {None, *range(source.model_config.num_layers)}
    kinds = {point.sublayer for point in points}
    assert kinds == {"embedding", "norm", "attention", "mlp", "layer"} | (
        {"router"}
        if "E" in "".join(tensor.axes for mapping in source.mappings for tensor in mapping.hf)
        else set()
    )


def _seen_by_megatron(folder: Any, points: Any) -> set[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification.workflow.megatron import capture_megatron

    return set(
        capture_megatron(
            build(AutoBridge.from_hf_pretrained(folder), Layout()), points, prompts(387, 1, 5)
        ).values
    )


def test_equal_sides_part_nowhere(run: Any) -> None:
    found = places(run, copy_of(run[2]))
    assert {place.difference for place in found} == {0.0} and locate(found) is None
    assert found[-1].name == LOGITS and found[0].sublayer == "embedding"
    assert [place.layer for place in found if place.sublayer == "layer"] == list(range(8))
    check = compare_logits([run[2]], [copy_of(run[2])], found)
    assert (
        check.passed
        and check.metrics["max"] == 0
        and check.metrics["top1"] == 1
        and check.metrics["positions"] == 42
    )


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.0.self_attn.q_norm", "model.layers.5.mlp", LOGITS]
)
@pytest.mark.parametrize("at", [(0, 0), (1, 20), (1, 7)])
def test_one_number_beyond_rounding_is_found_where_it_is(
    name: str, at: tuple[int, int], run: Any
) -> None:
    ours = copy_of(run[2])
    value = ours.logits if name == LOGITS else ours.values[name]
    value[*at, 3] += 1e-3 * value[at].abs().max()
    location = locate(places(run, ours))
    assert (
        location is not None
        and location.name == name
        and location.causes == CAUSES[location.sublayer]
    )
    assert (name == LOGITS) == (not compare_logits([run[2]], [ours], places(run, ours)).passed)


def test_the_first_place_is_the_first_of_the_arithmetic(run: Any) -> None:
    ours = copy_of(run[2])
    for name in (
        "model.layers.6",
        "model.layers.2.post_attention_layernorm",
        "model.layers.2.mlp",
        "model.norm",
    ):
        ours.values[name] += 1
    location = locate(places(run, ours))
    assert location is not None and (location.layer, location.sublayer) == (2, "norm")
    assert (
        str(location)
        == "hidden states diverge at layer 2, norm (model.layers.2.post_attention_layernorm)"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.3", LOGITS])
def test_what_is_no_number_parts(name: str, value: float, run: Any) -> None:
    ours = copy_of(run[2])
    (ours.logits if name == LOGITS else ours.values[name])[1, 2, 3] = value
    location = locate(places(run, ours))
    assert location is not None and location.name == name
    if name == LOGITS:
        assert not compare_logits([run[2]], [ours], places(run, ours)).passed


def test_a_place_that_only_one_side_saw_parts(run: Any) -> None:
    ours = copy_of(run[2])
    del ours.values["model.layers.4"]
    location = locate(places(run, ours))
    assert location is not None and location.name == "model.layers.4"


def test_heads_that_tensor_parallelism_cuts_are_left_out(run: Any) -> None:
    ours = copy_of(run[2])
    heads = [point.hf for point in run[1] if point.heads]
    assert len(heads) == 8 * 5
    for name in heads:
        del ours.values[name]
    assert locate(places(run, ours)) is None


def test_another_shape_parts(run: Any) -> None:
    ours = copy_of(run[2])
    ours.values["model.layers.1"] = ours.values["model.layers.1"][..., :-1]
    location = locate(places(run, ours))
    assert location is not None and location.name == "model.layers.1"


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_every_position(run: Any) -> None:
    ours = copy_of(run[2])
    word = ours.logits[0, 3].argmax()
    ours.logits[0, 3, word] -= 100
    check = compare_logits([run[2]], [ours], places(run, ours))
    assert not check.passed
    assert check.metrics["max"] == pytest.approx(100, rel=1e-4)
    assert check.metrics["mean"] == pytest.approx(100 / ours.logits.numel(), rel=1e-3)
    assert check.metrics["top1"] == pytest.approx(41 / 42)
    expected = run[2].logits[0, 3].double().log_softmax(-1)
    kl = (expected.exp() * (expected - ours.logits[0, 3].double().log_softmax(-1))).sum()
    assert check.metrics["kl_max"] == pytest.approx(kl.item(), rel=1e-6)
    assert check.metrics["kl_mean"] == pytest.approx(kl.item() / 42, rel=1e-6)


def test_positions_behind_a_routers_tie_do_not_count(run: Any) -> None:
    model_config, points, reference = run
    decided = torch.ones(2, 21, dtype=torch.bool)
    decided[1, 5:] = False
    tied = Activations(reference.logits, reference.values, reference.amplification, decided)
    ours = copy_of(reference)
    ours.logits[1, 5] += 1
    found = compare_activations(points, [tied], [ours], model_config)
    check = compare_logits([tied], [ours], found)
    assert check.passed and check.metrics["positions"] == 26 and check.metrics["skipped"] == 16
    assert "16 behind a router's tie left out" in check.summary
    ours.logits[1, 4] += 1
    assert not compare_logits(
        [tied], [ours], compare_activations(points, [tied], [ours], model_config)
    ).passed
    nothing = Activations(
        reference.logits,
        reference.values,
        reference.amplification,
        torch.zeros(2, 21, dtype=torch.bool),
    )
    assert not compare_logits(
        [nothing], [reference], compare_activations(points, [nothing], [reference], model_config)
    ).passed


def test_half_precision_may_be_as_far_as_transformers_and_a_tenth(run: Any) -> None:
    reference = run[2]

    def away(by: float) -> Activations:
        noise = torch.randn(
            reference.logits.shape, generator=torch.Generator().manual_seed(int(by * 1000))
        )
        return Activations(reference.logits + by * noise)

    for ours, passed in (
        (0.5, True),
        (1.0, True),
        (1.08, True),
        (1.13, False),
        (3.0, False),
        (float("nan"), False),
    ):
        side = Activations(reference.logits * float("nan")) if ours != ours else away(ours)
        assert (
            compare_half_precision([reference], [away(1.0)], [side], "bfloat16").passed == passed
        ), ours


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_the_bound_follows_from_roundoff_terms_and_amplification(run: Any) -> None:
    rounding = RoundingModel(run[0], 21)
    assert (
        rounding.threshold(100, 0.1)
        == rounding.threshold(100, 1)
        == pytest.approx(2**0.5 * UNIT_ROUNDOFF * 10)
    )
    assert rounding.threshold(400, 3) == pytest.approx(6 * rounding.threshold(100, 1))
    assert rounding.threshold(1e30, 1) == rounding.threshold(1, 1e30) == CEILING
    terms = [rounding.terms(layer, kind) for layer in range(8) for kind in ("attention", "layer")]
    assert terms == sorted(terms) and terms[0] > rounding.terms(None, "embedding")
    assert rounding.terms(None, "output layer", is_last=True) > terms[-1]


def test_a_small_change_becomes_what_the_model_makes_of_it(run: Any) -> None:
    amplification = run[2].amplification
    assert amplification["model.embed_tokens"] == 1
    assert all(0.5 < value < 30 for value in amplification.values())
    assert amplification.keys() == {*run[2].values, LOGITS}


def test_the_reference_is_transformers_eager_model(tiny: Any, run: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny("exaone4"), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        output = model(prompts(387, 2, 21), output_hidden_states=True, use_cache=False)
    values = run[2].values
    torch.testing.assert_close(run[2].logits, output.logits, atol=1e-5, rtol=1e-5)
    for layer in range(7):  # hidden_states[0] is the embedding's output
        torch.testing.assert_close(
            values[f"model.layers.{layer}"], output.hidden_states[layer + 1], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(values["model.norm"], output.hidden_states[8], atol=1e-5, rtol=1e-5)


def test_a_tie_is_where_a_nudge_changes_the_experts(megatron_bridge: Any, tiny: Any) -> None:
    """At one token the third and the fourth expert of a layer are made to score the same, as far as fp32 can tell."""
    folder = tiny("ernie45")
    source, model = HFCheckpoint.open(folder), load(folder, torch.float32)
    points, tokens = probe_points(source.mappings), prompts(387, 1, 30)
    gate, seen = model.model.layers[2].mlp.gate, []
    handle = gate.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    decided = capture_transformers(model, points, tokens).stable
    handle.remove()
    assert decided is not None and decided.all()
    bias = gate.moe_statics.e_score_correction_bias[0]
    scores = seen[0][10].softmax(-1) + bias
    order = scores.argsort(descending=True)
    with torch.no_grad():
        bias[order[3]] += scores[order[2]] - scores[order[3]]
    tied = capture_transformers(model, points, tokens).stable
    assert (
        tied is not None and tied[0, :10].all() and not tied[0, 10:].any()
    )  # attention carries it to later positions


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_routing_weights_of_any_number_of_experts(topk: int) -> None:
    logits = torch.randn(5, 8)
    weights, chosen = logits.softmax(-1).topk(topk)
    whole, picked = routing_weights((logits, chosen, weights))
    assert whole.shape == (5, 8) and torch.equal(whole.gather(1, chosen), weights)
    assert torch.equal(picked, whole > 0) and int(picked.sum()) == 5 * topk


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_the_seeds_and_use_the_whole_vocabulary() -> None:
    words = prompts(50, 3, 400)
    assert words.shape == (3, 400) and words.dtype == torch.int64
    assert set(words.flatten().tolist()) == set(range(50))
    assert torch.equal(words, prompts(50, 3, 400)) and not torch.equal(
        words, prompts(50, 3, 400, seed=1)
    )
    assert not torch.equal(words[0], words[1])


@pytest.mark.parametrize(
    ("windows", "original", "length"),
    [
        ((8, 8, None), None, 41),
        ((8, 8, None), 32, 65),
        ((None, None), None, 64),
        ((None, None), 100, 133),
        ((125, None), None, 509),
        ((126, None), None, 64),
        ((4096,), 8192, 64),
        ((8,), 8192, 41),
    ],
)
def test_prompts_pass_window_and_ropes_own_length_where_that_is_affordable(
    windows: tuple[int | None, ...], original: int | None, length: int
) -> None:
    assert prompt_length(windows, original) == length


def test_points_say_how_to_look(tiny: Any) -> None:
    takes = {
        point.hf: (point.capture, point.megatron)
        for point in probe_points(HFCheckpoint.open(tiny("exaone4")).mappings)
    }
    assert takes["model.layers.2.mlp"] == (
        Capture.INPUT,
        "decoder.layers.2.mlp.linear_fc2.post_layernorm",
    )
    takes = {
        point.hf: (point.capture, point.megatron)
        for point in probe_points(HFCheckpoint.open(tiny("ernie45")).mappings)
    }
    assert takes["model.layers.2.mlp"] == (Capture.OUTPUT, "decoder.layers.2.mlp")
    assert takes["model.layers.0.input_layernorm"] == (
        Capture.FUSED_NORM,
        "decoder.layers.0.self_attention.linear_qkv",
    )
    assert takes["model.layers.1.mlp.gate"] == (Capture.ROUTER, "decoder.layers.1.mlp.router")
