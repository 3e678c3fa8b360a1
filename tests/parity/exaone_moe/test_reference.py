"""K-EXAONE 2.0 and multi-token prediction against a reference in plain torch.

Transformers 5.12.1 runs neither. Where it runs the model, the reference equals it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from exaone_bridge.errors import UnmappedTensors, UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.folders import compare_tensors
from exaone_bridge.verification.self_test.fault import changed_model, changed_provider, swap
from tests.helpers.exaone_moe import run_reference
from tests.helpers.layouts import slow
from tests.helpers.mtp import mtp_of_megatron, random_tokens
from tests.helpers.training import assert_gradients_equal

TWO = "exaone-moe-2"


def _logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def _logits_of_megatron(
    folder: Path, layout: Layout, tokens: torch.Tensor, exported: Path | None = None
) -> torch.Tensor | None:
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, layout)
    if exported is not None:
        bridge.save_hf_pretrained(model, exported, show_progress=False)
    return forward_logits(model, tokens)


@pytest.mark.parametrize("fields", [{}, {"n_group": 2, "topk_group": 1}, {"norm_topk_prob": False}])
def test_reference_equals_transformers_where_the_two_overlap(
    megatron_bridge: Any, tiny: Any, fields: dict[str, Any]
) -> None:
    folder, tokens = tiny("exaone-moe", **fields), random_tokens()
    expected = ForkLauncher().first(_logits_of_transformers, folder, tokens[:, :-1])
    assert (run_reference(folder, tokens).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, ep=2, sp=True),
        Layout(pp=2, vpp=3),
        Layout(cp=2),
        *slow(Layout(tp=2), Layout(pp=3), Layout(ep=4)),
    ],
    ids=str,
)
def test_model_with_clamps_and_two_windows_equals_the_reference(
    megatron_bridge: Any, tiny: Any, tmp_path: Path, layout: Layout
) -> None:
    folder, tokens = tiny(TWO), random_tokens()
    reference = run_reference(folder, tokens).logits
    results = ForkLauncher(layout.ranks).all(
        _logits_of_megatron, folder, layout, tokens[:, :-1], tmp_path / "exported"
    )
    logits = [each for each in results if each is not None]
    assert logits and all((each - reference).abs().max() <= 1e-4 for each in logits)
    assert compare_tensors(folder, tmp_path / "exported").passed


@pytest.mark.parametrize(
    "fields",
    [
        {"swiglu_limits": None},
        {"swiglu_limits": [0.0, 0.5, 0.5, 0.0, 0.5, 0.5]},
        {"sliding_windows": [0, 5, 5, 5, 5, 0], "sliding_window": 5},
    ],
    ids=["no clamp", "clamp of another layer", "window of another layer"],
)
def test_clamp_and_windows_change_the_logits(tiny: Any, fields: dict[str, Any]) -> None:
    """The tiny model's activations exceed the limits, and its prompts the windows."""
    tokens = random_tokens()
    logits = run_reference(tiny(TWO), tokens).logits
    assert (run_reference(tiny(TWO, **fields), tokens).logits - logits).abs().max() > 1e-3


def test_transformers_differs_from_the_reference_of_a_clamped_model(
    megatron_bridge: Any, tiny: Any
) -> None:
    """Why the reference of such a model is not Transformers."""
    folder, tokens = tiny(TWO), random_tokens()
    of_transformers = ForkLauncher().first(_logits_of_transformers, folder, tokens[:, :-1])
    assert (run_reference(folder, tokens).logits - of_transformers).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "depth", "layout"),
    [
        ("exaone-moe", 1, Layout()),
        ("exaone-moe", 1, Layout(tp=2, sp=True)),
        ("exaone-moe", 1, Layout(pp=2, vpp=2)),
        (TWO, 2, Layout()),
        *(pytest.param(TWO, 4, layout, marks=pytest.mark.slow) for layout in [Layout(ep=2)]),
    ],
    ids=str,
)
def test_mtp_logits_losses_and_gradients_equal_the_reference(
    megatron_bridge: Any, tiny: Any, name: str, depth: int, layout: Layout
) -> None:
    """The exported tensors equal the source's, those of multi-token prediction among them."""
    folder, tokens = tiny(name), random_tokens()
    reference = run_reference(folder, tokens, depth)
    results = ForkLauncher(layout.ranks).all(mtp_of_megatron, folder, layout, tokens, depth, {})
    assert any(result.logits for result in results)
    for result in results:
        assert not result.differing
        for number, logits in enumerate(result.logits):
            expected = reference.mtp_logits[number]
            assert (logits - expected)[:, : -1 - number].abs().max() <= 1e-4
        for loss, expected_loss in zip(result.losses, reference.losses[1:], strict=False):
            assert abs(loss - expected_loss) <= 1e-4
        assert_gradients_equal(result.gradients, reference.gradients)


def test_two_layers_of_mtp_on_disk_are_not_built(megatron_bridge: Any, tiny: Any) -> None:
    fields = {
        "num_nextn_predict_layers": 2,
        "mtp_layer_types": ["full_attention"] * 2,
        "mtp_sliding_windows": [0, 0],
    }
    with pytest.raises(UnsupportedConfig, match="num_nextn_predict_layers"):
        ForkLauncher().first(
            mtp_of_megatron, tiny("exaone-moe", **fields), Layout(), random_tokens(), 1, {}
        )


def test_mtp_with_an_moe_layer_is_rejected(megatron_bridge: Any, tiny: Any) -> None:
    """A dense layer is on disk; the sentence names the router that has no mapping."""
    from exaone_bridge.models.exaone_moe import provider
    from exaone_bridge.models.exaone_moe.layer_spec import exaone_moe_layer_spec

    original = provider.mtp_block_spec

    def with_experts(config: Any, backend: Any, layer: Any, **options: Any) -> Any:
        return original(config, backend, exaone_moe_layer_spec(backend, moe=True), **options)

    with (
        mock.patch.object(provider, "mtp_block_spec", with_experts),
        pytest.raises(UnmappedTensors, match=r"mtp\.layers\.0\.mtp_model_layer\.mlp"),
    ):
        ForkLauncher().first(mtp_of_megatron, tiny("exaone-moe"), Layout(), random_tokens(), 1, {})


def test_mtp_takes_the_first_limit(megatron_bridge: Any, tiny: Any) -> None:
    """As in vLLM; so a limit that a user sets for all layers is exported and read again."""
    folder, tokens = tiny(TWO, swiglu_limits=[0.5] * 6), random_tokens()
    reference = run_reference(folder, tokens, 1)
    same: dict[str, Any] = {"swiglu_limits": None, "activation_func_clamp_value": 0.5}
    for overrides in ({}, same):
        found = ForkLauncher().first(mtp_of_megatron, folder, Layout(), tokens, 1, overrides)
        assert (found.logits[0] - reference.mtp_logits[0])[:, :-1].abs().max() <= 1e-4
        assert_gradients_equal(found.gradients, reference.gradients)
    (plain,) = run_reference(tiny(TWO, swiglu_limits=[0.0] + [0.5] * 5), tokens, 1).mtp_logits
    assert (plain - reference.mtp_logits[0])[:, :-1].abs().max() > 1e-3


# --- injected faults that Transformers cannot tell ------------------------------------------------


def _activations_of_megatron(folder: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what `ReferenceResult.activations` has, of a model with multi-token prediction."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build, forward_logits

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout(), mtp_num_layers=1)
    prediction = model.mtp.layers[0]
    layers = {str(number): layer for number, layer in enumerate(model.decoder.layers)}
    points = {"mtp, projection": prediction.eh_proj}
    for name, layer in [*layers.items(), ("mtp", prediction.mtp_model_layer)]:
        points |= {f"{name}, attention": layer.self_attention, f"{name}, mlp": layer.mlp}
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in points.items():
        module.register_forward_hook(
            lambda _, __, output, name=name: found.setdefault(name, []).append(
                output[0].transpose(0, 1).clone()
            )
        )
    forward_logits([model], tokens)
    return {name: torch.cat(parts)[: len(tokens)] for name, parts in found.items()}


Fault = contextlib.AbstractContextManager[object]


def _fields(**fields: object) -> Callable[[], Fault]:
    return lambda: changed_provider(fields)


def _weights(change: Callable[[Any], object]) -> Callable[[], Fault]:
    """Change the language model after it was loaded."""
    return lambda: changed_model(lambda model: change(model[0]))


def _without_clamp(mlp: Any) -> None:
    mlp.config = copy.copy(mlp.config)
    mlp.config.activation_func_clamp_value = None


def _no_clamp_in_shared_experts(model: Any) -> None:
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "shared_experts"):
            _without_clamp(layer.mlp.shared_experts)


def _no_clamp_in_routed_experts(model: Any) -> None:
    for layer in model.decoder.layers:
        for expert in getattr(getattr(layer.mlp, "experts", None), "local_experts", ()):
            _without_clamp(expert)


def _another_gate(gate_of: Callable[[torch.Tensor, float], torch.Tensor]) -> Callable[[], Fault]:
    """Compute SiLU and clamp of the gate in another way; `up` stays clamped."""

    def change(model: Any) -> None:
        from megatron.core.transformer.mlp import MLP

        for mlp in (module for module in model.modules() if isinstance(module, MLP)):
            if not (limit := mlp.config.activation_func_clamp_value):
                continue

            def clamp_up(_: Any, __: Any, output: Any, limit: float = limit) -> Any:
                gate, up = output[0].chunk(2, dim=-1)
                return torch.cat([gate, up.clamp(-limit, limit)], dim=-1), output[1]

            _without_clamp(mlp)
            mlp.config.activation_func = functools.partial(
                lambda gate, limit: gate_of(gate, limit), limit=limit
            )
            mlp.linear_fc1.register_forward_hook(clamp_up)

    return _weights(change)


def _mtp_layer(**fields: bool) -> Callable[[], Fault]:
    def patch() -> Fault:
        from exaone_bridge.models.exaone_moe import provider

        original = provider.mtp_block_spec
        return mock.patch.object(
            provider,
            "mtp_block_spec",
            lambda *args, **kwargs: original(*args, **{**kwargs, **fields}),
        )

    return patch


def _swap_inputs(model: Any) -> None:
    swap(*model.mtp.layers[0].eh_proj.weight.chunk(2, dim=1))


def _swap_norms(model: Any) -> None:
    swap(model.mtp.layers[0].enorm.weight, model.mtp.layers[0].hnorm.weight)


def _before_the_final_norm(model: Any) -> None:
    inputs: list[torch.Tensor] = []
    model.decoder.final_layernorm.register_forward_pre_hook(
        lambda _, arguments: inputs.append(arguments[0].clone())
    )
    model.mtp.layers[0].hnorm.register_forward_pre_hook(lambda *_: (inputs.pop(0),))


silu = torch.nn.functional.silu
FAULTS: dict[str, tuple[str, Callable[[], Fault], str]] = {
    "clamp dropped": (TWO, _fields(swiglu_limits=None), "1, mlp"),
    "clamp dropped in shared experts": (TWO, _weights(_no_clamp_in_shared_experts), "3, mlp"),
    "clamp dropped in routed experts": (TWO, _weights(_no_clamp_in_routed_experts), "3, mlp"),
    "clamp dropped in a dense layer": (
        TWO,
        _weights(lambda model: _without_clamp(model.decoder.layers[1].mlp)),
        "1, mlp",
    ),
    "clamp after SiLU": (
        TWO,
        _another_gate(lambda gate, limit: silu(gate).clamp(max=limit)),
        "1, mlp",
    ),
    "gate clamped below too": (
        TWO,
        _another_gate(lambda gate, limit: silu(gate.clamp(-limit, limit))),
        "1, mlp",
    ),
    "limit of another layer": (
        TWO,
        _fields(swiglu_limits=[0.0, 0.5, 0.5, 0.0, 0.5, 0.5]),
        "2, mlp",
    ),
    "window of another layer": (TWO, _fields(layer_windows=[0, 5, 5, 5, 5, 0]), "1, attention"),
    "one window for all layers": (TWO, _fields(layer_windows=None), "2, attention"),
    "MTP with a window": ("exaone-moe", _mtp_layer(sliding=True), "mtp, attention"),
    "MTP with RoPE": ("exaone-moe", _mtp_layer(use_rope=True), "mtp, attention"),
    "MTP with the hidden state first": ("exaone-moe", _weights(_swap_inputs), "mtp, projection"),
    "MTP with its norms swapped": ("exaone-moe", _weights(_swap_norms), "mtp, projection"),
    "MTP of the hidden state before the final norm": (
        "exaone-moe",
        _weights(_before_the_final_norm),
        "mtp, projection",
    ),
}


@pytest.fixture(scope="module")
def references(tiny: Any) -> Callable[[str], dict[str, torch.Tensor]]:
    """Return the reference's activations of a tiny model."""
    return functools.cache(lambda name: run_reference(tiny(name), random_tokens(), 1).activations)


def _first_difference(
    megatron: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> str | None:
    """Return the first activation that differs; the last position has no token to predict from."""
    assert megatron.keys() == reference.keys()
    for name, expected in reference.items():
        difference = (megatron[name] - expected)[:, :-1].abs().max()
        if difference > 1e-4:
            assert difference > 1e-3
            return name
    return None


@pytest.mark.parametrize("name", ["exaone-moe", TWO])
def test_activations_equal_the_reference_without_a_fault(
    megatron_bridge: Any, tiny: Any, references: Any, name: str
) -> None:
    inputs = random_tokens()[:, :-1]
    found = ForkLauncher().first(_activations_of_megatron, tiny(name), inputs)
    assert _first_difference(found, references(name)) is None


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_located_by_the_reference(
    megatron_bridge: Any, tiny: Any, references: Any, fault: str
) -> None:
    name, injected, site = FAULTS[fault]
    inputs = random_tokens()[:, :-1]
    with injected():
        found = ForkLauncher().first(_activations_of_megatron, tiny(name), inputs)
    assert _first_difference(found, references(name)) == site
