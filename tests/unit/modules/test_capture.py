"""Training passes contain nothing of ours that CUDA graphs cannot capture.

The torch backend stands in for Transformer Engine's: routers, RoPE, norms, layers, vocabulary mask
and losses are the same modules. Kernels and grouped experts run on GPUs only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.models import FAMILIES
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.adapters import ATTENTION, make_peft
from tests.helpers.waiting import places_that_wait

TINY = [name for family in FAMILIES for name in family.tiny]
_MEGATRON_CORE = {
    # Experts of the torch backend; those of Transformer Engine are others.
    "megatron/core/transformer/moe/experts.py:forward",
    "megatron/core/transformer/moe/token_dispatcher.py:dispatch_postprocess",
    # States of the CPU's random numbers; Transformer Engine's tracker has generators.
    "megatron/core/tensor_parallel/random.py:fork",
}
_FROZEN_VISION = {"freeze_vision_model": True, "freeze_vision_projection": True}
# Fields of the provider: what recipes for text freeze, and the balancing of pretraining.
FIELDS = {
    "exaone45": _FROZEN_VISION,
    "ernie45": {"moe_router_enable_expert_bias": True},
    "k-exaone": {
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-4,
    },
}


def _places(
    folder: Path, layout: Layout, fields: dict[str, Any], scheme: str | None = None
) -> set[str]:
    """On a rank: the places that wait in a second training pass, forward and backward."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), layout, **fields)
    model.train()
    if scheme is not None:
        (model,) = make_peft(scheme, ATTENTION)([model])
    length = 40 // layout.cp
    tokens = torch.randint(300, (1, length), generator=torch.Generator().manual_seed(3))
    head = {"pool": False} if getattr(model.config, "head", None) else {"labels": tokens}

    def step() -> None:
        model(tokens, torch.arange(length)[None], None, **head).float().mean().backward()

    step()  # fills caches, as the steps before a capture do
    with places_that_wait() as found:
        step()
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_training_pass_does_not_wait(name: str, megatron_bridge: Any, tiny: Any) -> None:
    found = ForkLauncher().first(_places, tiny(name), Layout(), FIELDS.get(name, {}))
    assert found - _MEGATRON_CORE == set()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", Layout(cp=2)),
        ("exaone4", Layout(tp=2, sp=True)),
        ("ernie45", Layout(tp=2, sp=True, ep=2, etp=1)),
    ],
    ids=str,
)
def test_a_training_pass_of_several_ranks_does_not_wait(
    name: str, layout: Layout, megatron_bridge: Any, tiny: Any
) -> None:
    launcher = ForkLauncher(layout.ranks)
    found = set().union(*launcher.all(_places, tiny(name), layout, FIELDS.get(name, {})))
    assert found - _MEGATRON_CORE == set()


@pytest.mark.parametrize("scheme", ["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["exaone4", "ernie45"])
def test_a_training_pass_with_adapters_does_not_wait(
    name: str, scheme: str, megatron_bridge: Any, tiny: Any
) -> None:
    found = ForkLauncher().first(_places, tiny(name), Layout(), {}, scheme)
    assert found - _MEGATRON_CORE == set()


def test_a_router_that_reads_a_value_is_found(
    megatron_bridge: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exaone_bridge.modules.router import SelectionBiasRouter

    gating = SelectionBiasRouter.gating

    def reads(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = gating(self, hidden)
        return logits + 0.0 * logits.max().item()

    monkeypatch.setattr(SelectionBiasRouter, "gating", reads)
    found = ForkLauncher().first(_places, tiny("ernie45"), Layout(), {})
    assert found - _MEGATRON_CORE == {"megatron/core/transformer/moe/router.py:forward"}


def _wait(tensor: torch.Tensor) -> None:
    """Wait in every way that `places_that_wait` knows."""
    mask = tensor > 0
    for wait in (
        tensor.sum().item,
        tensor.tolist,
        tensor.nonzero,
        lambda: tensor[mask],
        lambda: bool(mask.any()),
        lambda: tensor.index_put((mask,), tensor[:1].expand(int(mask.sum()))),
        lambda: torch.tensor([1.0], device=torch.device("cpu", 0)),
    ):
        with places_that_wait() as found:
            wait()
        assert found, wait


def test_waiting_is_found() -> None:
    _wait(torch.randn(8))
    with places_that_wait() as found:
        tensor = torch.randn(8)
        tensor[tensor > 0] = 0.0  # masked_fill
        torch.where(tensor > 0, tensor, 1.0).sum()
    assert not found


def _layer_inputs(folder: Path) -> list[tuple[str, list[str], list[str]]]:
    """On a rank: the class of each layer, and the inputs of its graph at capture and replay."""
    import sys
    from unittest import mock

    from megatron.bridge import AutoBridge
    from megatron.core.transformer import transformer_layer

    from exaone_bridge.runtime.model import build

    (model,) = build(AutoBridge.from_hf_pretrained(folder), Layout())
    stand_in = mock.MagicMock()
    modules = {"transformer_engine": stand_in, "transformer_engine.pytorch": stand_in}
    result = []
    for layer in model.modules():
        if not isinstance(layer, transformer_layer.TransformerLayer):
            continue
        inputs = layer.get_layer_static_inputs(16, 1)
        hidden = inputs["hidden_states"]
        with (
            mock.patch.dict(sys.modules, modules),
            mock.patch.object(transformer_layer, "is_te_min_version", return_value=True),
        ):
            _, replayed = layer._get_te_cuda_graph_replay_args(hidden, attention_mask=None)
        result.append((type(layer).__name__, list(inputs), sorted(replayed)))
    return result


@pytest.mark.parametrize("name", TINY)
def test_graphs_of_layers_have_no_mask(name: str, megatron_bridge: Any, tiny: Any) -> None:
    for layer, captured, replayed in ForkLauncher().first(_layer_inputs, tiny(name)):
        assert layer != "TransformerLayer"
        assert captured == ["hidden_states"] and replayed == ["is_first_microbatch"]
