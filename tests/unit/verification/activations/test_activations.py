"""Probe points, captured activations, their differences and thresholds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.schema.param_mapping import MappingKind, ParamMapping, hf_tensors
from exaone_bridge.verification.activations.capture import (
    Activations,
    routing_weights,
    transformers_hooks,
)
from exaone_bridge.verification.activations.compare import compare_activations
from exaone_bridge.verification.activations.divergence import CAUSES, first_divergence
from exaone_bridge.verification.activations.probe_points import (
    LOGITS,
    Capture,
    ProbePoint,
    probe_points,
)
from exaone_bridge.verification.activations.rounding import (
    MAX_THRESHOLD,
    UNIT_ROUNDOFF,
    RoundingModel,
)
from exaone_bridge.verification.report.report import ActivationDiff
from exaone_bridge.verification.workflow.transformers import capture_transformers, load
from exaone_bridge.verification.workflow.workload import PromptBatch, random_prompts
from tests.helpers.reference import Reference

NAMES = ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b", "ernie45-dense"]


def differences(reference: Reference, compared: Activations) -> tuple[ActivationDiff, ...]:
    return compare_activations(
        reference.points, [reference.activations], [compared], reference.model_config
    )


# --- probe points -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_probe_point_of_every_layer_is_in_both_models(
    name: str, megatron_bridge: Any, tiny: Any
) -> None:
    from exaone_bridge.runtime.fork import ForkLauncher

    checkpoint = HFCheckpoint.open(tiny(name))
    points = probe_points(checkpoint.mappings)
    found = ForkLauncher().first(_captured_by_megatron, checkpoint.folder, points)
    modules = dict(load(checkpoint.folder, torch.float32).named_modules())
    assert {point.hf for point in points} == found
    assert {point.hf for point in points} <= modules.keys()
    assert {point.layer for point in points} == {None, *range(checkpoint.model_config.num_layers)}
    axes = "".join(tensor.axes for tensor in hf_tensors(checkpoint.mappings).values())
    assert {point.sublayer for point in points} == {
        "embedding",
        "norm",
        "attention",
        "mlp",
        "layer",
    } | ({"router"} if "E" in axes else set())


def _captured_by_megatron(folder: Path, points: tuple[ProbePoint, ...]) -> set[str]:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build
    from exaone_bridge.schema.parallel_layout import Layout
    from exaone_bridge.verification.workflow.megatron import capture_megatron

    model = build(AutoBridge.from_hf_pretrained(folder), Layout())
    return set(capture_megatron(model, points, PromptBatch(random_prompts(387, 1, 5))).values)


def test_probe_points_follow_from_pre_norm_and_post_norm(tiny: Any) -> None:
    def captures(name: str) -> dict[str, tuple[Capture, str]]:
        points = probe_points(HFCheckpoint.open(tiny(name)).mappings)
        return {point.hf: (point.capture, point.megatron) for point in points}

    exaone, ernie = captures("exaone4"), captures("ernie45")
    assert exaone["model.layers.2.mlp"] == (
        Capture.INPUT,
        "decoder.layers.2.mlp.linear_fc2.post_layernorm",
    )
    assert ernie["model.layers.2.mlp"] == (Capture.OUTPUT, "decoder.layers.2.mlp")
    assert ernie["model.layers.0.input_layernorm"] == (
        Capture.FUSED_NORM,
        "decoder.layers.0.self_attention.linear_qkv",
    )
    assert ernie["model.layers.1.mlp.gate"] == (Capture.ROUTER, "decoder.layers.1.mlp.router")


def test_a_mapping_without_layers_makes_no_probe_points(tiny: Any) -> None:
    """`ParamMapping` rejects such a mapping, so that it is made around the check."""
    mappings = HFCheckpoint.open(tiny("ernie45")).mappings
    empty = [copy.copy(mapping) for mapping in mappings if "*" in mapping.megatron]
    for mapping in empty:
        object.__setattr__(mapping, "layers", ())
    assert {MappingKind.QKV, MappingKind.REPLICATED} <= {mapping.kind for mapping in empty}
    assert probe_points(empty) == ()
    assert probe_points((*mappings, *empty)) == probe_points(mappings)


# --- capture ------------------------------------------------------------------------------------


def _attention(kind: str, heads: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A tiny attention module of Transformers with a QK norm, and its RoPE module."""
    from transformers import Exaone4Config, Qwen3Config
    from transformers.models.exaone4.modeling_exaone4 import (
        Exaone4Attention,
        Exaone4RotaryEmbedding,
    )
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_hidden_layers": 1,
        "attn_implementation": "eager",
    }
    if kind == "qwen3":
        config = Qwen3Config(**sizes)
        return Qwen3Attention(config, 0).eval(), Qwen3RotaryEmbedding(config)
    config = Exaone4Config(**sizes)
    return Exaone4Attention(config, 0).eval(), Exaone4RotaryEmbedding(config)


@pytest.mark.parametrize("kind", ["qwen3", "exaone4"])
@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_norm_of_heads_is_captured_with_tokens_before_heads(
    kind: str, heads: int, length: int
) -> None:
    """Qwen3 normalises [N, S, heads, D], EXAONE 4.0 [N, heads, S, D]; both may have S = heads."""
    torch.manual_seed(0)
    attention, rope = _attention(kind, heads)
    hidden = torch.randn(2, length, 24)
    points = [
        ProbePoint(name, 0, "norm", name, Capture.OUTPUT, head_sharded=True)
        for name in ("q_norm", "k_norm")
    ]
    found: dict[str, torch.Tensor] = {}

    def keep(point: ProbePoint, value: torch.Tensor, _: torch.Tensor | None) -> None:
        found[point.hf] = value

    with torch.no_grad(), transformers_hooks(attention, points, length, keep):
        attention(hidden, rope(hidden, torch.arange(length)[None]), None)
    for name, projection, count in (("q", "q_proj", heads), ("k", "k_proj", 1)):
        projected = getattr(attention, projection)(hidden).view(2, length, count, 6)
        expected = getattr(attention, f"{name}_norm")(projected).flatten(2)
        torch.testing.assert_close(found[f"{name}_norm"], expected)


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_routing_weights_of_any_number_of_experts(topk: int) -> None:
    weights, indices = torch.randn(5, 8).softmax(-1).topk(topk)
    expanded, chosen = routing_weights(indices, weights, 8)
    assert expanded.shape == (5, 8) and torch.equal(expanded.gather(1, indices), weights)
    assert torch.equal(chosen, expanded > 0) and int(chosen.sum()) == 5 * topk


# --- differences --------------------------------------------------------------------------------


def test_equal_models_do_not_diverge(reference: Reference) -> None:
    found = differences(reference, reference.copy())
    assert {each.difference for each in found} == {0.0} and first_divergence(found) is None
    assert found[-1].name == LOGITS and found[0].sublayer == "embedding"
    assert [each.layer for each in found if each.sublayer == "layer"] == list(range(8))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.0.self_attn.q_norm", "model.layers.5.mlp", LOGITS]
)
@pytest.mark.parametrize("at", [(0, 0), (1, 20), (1, 7)])
def test_one_number_beyond_rounding_is_located(
    name: str, at: tuple[int, int], reference: Reference
) -> None:
    compared = reference.copy()
    value = compared.logits if name == LOGITS else compared.values[name]
    value[*at, 3] += 1e-3 * value[at].abs().max()
    divergence = first_divergence(differences(reference, compared))
    assert divergence is not None and divergence.name == name
    assert divergence.causes == CAUSES[divergence.sublayer]


def test_the_divergence_is_the_first_in_execution_order(reference: Reference) -> None:
    compared = reference.copy()
    norm = "model.layers.2.post_attention_layernorm"
    for name in ("model.layers.6", norm, "model.layers.2.mlp", "model.norm"):
        compared.values[name] += 1
    divergence = first_divergence(differences(reference, compared))
    assert divergence is not None and (divergence.layer, divergence.sublayer) == (2, "norm")
    assert str(divergence) == f"hidden states diverge at layer 2, norm ({norm})"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.3", LOGITS])
def test_nan_and_infinity_diverge(name: str, value: float, reference: Reference) -> None:
    compared = reference.copy()
    (compared.logits if name == LOGITS else compared.values[name])[1, 2, 3] = value
    divergence = first_divergence(differences(reference, compared))
    assert divergence is not None and divergence.name == name


def test_a_missing_activation_diverges(reference: Reference) -> None:
    compared = reference.copy()
    del compared.values["model.layers.4"]
    divergence = first_divergence(differences(reference, compared))
    assert divergence is not None and divergence.name == "model.layers.4"


def test_another_shape_diverges(reference: Reference) -> None:
    compared = reference.copy()
    compared.values["model.layers.1"] = compared.values["model.layers.1"][..., :-1]
    divergence = first_divergence(differences(reference, compared))
    assert divergence is not None and divergence.name == "model.layers.1"


def test_activations_that_tp_shards_by_heads_are_left_out(reference: Reference) -> None:
    compared = reference.copy()
    sharded = [point.hf for point in reference.points if point.head_sharded]
    assert len(sharded) == 8 * 5
    for name in sharded:
        del compared.values[name]
    assert first_divergence(differences(reference, compared)) is None


# --- thresholds ---------------------------------------------------------------------------------


def test_the_threshold_follows_from_roundoff_terms_and_amplification(reference: Reference) -> None:
    rounding = RoundingModel(reference.model_config, 21)
    one = 2**0.5 * UNIT_ROUNDOFF * 10
    assert rounding.threshold(100, 0.1) == rounding.threshold(100, 1) == pytest.approx(one)
    assert rounding.threshold(400, 3) == pytest.approx(6 * rounding.threshold(100, 1))
    assert rounding.threshold(1e30, 1) == rounding.threshold(1, 1e30) == MAX_THRESHOLD
    terms = [rounding.terms(kind, layer) for layer in range(8) for kind in ("attention", "layer")]
    assert terms == sorted(terms) and terms[0] > rounding.terms("embedding")
    assert rounding.terms("output layer") > terms[-1]


def test_the_amplification_is_relative_to_the_embeddings(reference: Reference) -> None:
    amplification = reference.activations.amplification
    assert amplification["model.embed_tokens"] == 1
    assert all(0.5 < value < 30 for value in amplification.values())
    assert amplification.keys() == {*reference.activations.values, LOGITS}


def test_the_reference_is_transformers_eager_model(tiny: Any, reference: Reference) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("exaone4"), attn_implementation="eager")
    with torch.no_grad():
        output = model.eval()(reference.tokens, output_hidden_states=True, use_cache=False)
    found = reference.activations
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.logits, output.logits, **near)
    for layer in range(7):  # hidden_states[0] is the output of the embedding
        expected = output.hidden_states[layer + 1]
        torch.testing.assert_close(found.values[f"model.layers.{layer}"], expected, **near)
    torch.testing.assert_close(found.values["model.norm"], output.hidden_states[8], **near)


def test_tokens_after_a_router_tie_are_not_stable(megatron_bridge: Any, tiny: Any) -> None:
    """At one token the third and the fourth expert get the same score, as far as fp32 can tell."""
    checkpoint = HFCheckpoint.open(tiny("ernie45"))
    model = load(checkpoint.folder, torch.float32)
    points, batch = probe_points(checkpoint.mappings), PromptBatch(random_prompts(387, 1, 30))
    gate, logits = model.model.layers[2].mlp.gate, []
    handle = gate.register_forward_hook(lambda _, __, output: logits.append(output[0]))
    stable = capture_transformers(model, points, batch).stable
    handle.remove()
    assert stable is not None and stable.all()
    bias = gate.moe_statics.e_score_correction_bias[0]
    scores = logits[0][10].softmax(-1) + bias
    order = scores.argsort(descending=True)
    with torch.no_grad():
        bias[order[3]] += scores[order[2]] - scores[order[3]]
    tied = capture_transformers(model, points, batch).stable
    # Attention carries the difference to later tokens.
    assert tied is not None and tied[0, :10].all() and not tied[0, 10:].any()


def test_the_parameter_mapping_of_every_probe_point_names_its_layer(tiny: Any) -> None:
    mappings: tuple[ParamMapping, ...] = HFCheckpoint.open(tiny("exaone4")).mappings
    for point in probe_points(mappings):
        assert point.layer is None or f".{point.layer}" in point.hf
