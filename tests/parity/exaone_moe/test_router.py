"""EXAONE MoE's router: its arithmetic, load balancing, and the replay of recorded experts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.checks.gradients import relative_norm
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.balancing import after_one_step

UPDATE = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01}


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -40.0, -47.0])
@pytest.mark.parametrize(("groups", "group_topk"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_weights_and_experts_equal_those_of_transformers(
    megatron_bridge: Any, shift: float, groups: int, group_topk: int, norm_topk_prob: bool
) -> None:
    """Scores of logits near -47 sum to about 1e-20, which Transformers adds to the sum."""
    from transformers.models.exaone_moe.modeling_exaone_moe import ExaoneMoeSparseMoEBlock

    from exaone_bridge.models.exaone_moe.router import ExaoneMoeRouter

    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 8, generator=generator) + shift
    bias = 0.05 * torch.randn(8, generator=generator)
    block = SimpleNamespace(
        gate=SimpleNamespace(e_score_correction_bias=bias),
        n_group=groups,
        topk_group=group_topk,
        n_routed_experts=8,
        top_k=3,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )
    expected_experts, expected = ExaoneMoeSparseMoEBlock.route_tokens_to_experts(block, logits)
    router = SimpleNamespace(
        expert_bias=bias,
        groups=groups,
        group_topk=group_topk,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=2.5,
        top_k=lambda scores: scores.topk(3).indices,
    )
    weights, experts = ExaoneMoeRouter.choose(router, logits)
    zeros = torch.zeros(64, 8)
    torch.testing.assert_close(
        zeros.scatter(1, experts, weights), zeros.scatter(1, expected_experts, expected)
    )
    assert torch.equal(experts.sort().values, expected_experts.sort().values)


# --- load balancing -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step(megatron_bridge: Any, tiny: Any) -> Any:
    tokens = random_prompts(387, 1, 49)
    return lambda **overrides: ForkLauncher().first(
        after_one_step, tiny("exaone-moe"), tokens, overrides
    )


@pytest.fixture(scope="module")
def plain(one_step: Any) -> dict[str, torch.Tensor]:
    """A step without balancing."""
    result: dict[str, torch.Tensor] = one_step()
    return result


def test_selection_bias_stays_without_balancing(plain: dict[str, torch.Tensor], tiny: Any) -> None:
    with safe_open(tiny("exaone-moe") / "model.safetensors", "pt") as file:
        bias = file.get_tensor("model.layers.1.mlp.e_score_correction_bias")
    assert torch.equal(plain["bias"], bias)


def test_selection_bias_moves_by_the_update_rate(
    one_step: Any, plain: dict[str, torch.Tensor]
) -> None:
    """The update of the bias leaves the gradients as they are."""
    moved = one_step(**UPDATE)
    steps = (moved["bias"] - plain["bias"]).abs()
    assert torch.allclose(steps[steps > 0], torch.tensor(0.01)) and (steps > 0).sum() >= 6
    assert torch.allclose(moved["gradient"], plain["gradient"], atol=1e-6)


def test_sequence_loss_changes_the_gradient_only(
    one_step: Any, plain: dict[str, torch.Tensor]
) -> None:
    balanced = one_step(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1)
    assert torch.equal(balanced["bias"], plain["bias"])
    assert (balanced["gradient"] - plain["gradient"]).norm() > 0.01 * plain["gradient"].norm()


def test_sequence_loss_and_bias_update_are_accepted_together(
    one_step: Any, plain: dict[str, torch.Tensor]
) -> None:
    """K-EXAONE's own training had both (arXiv 2601.01739)."""
    sequence = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
    both = one_step(**UPDATE, **sequence)
    assert torch.allclose(both["bias"], one_step(**UPDATE)["bias"])
    assert torch.allclose(both["gradient"], one_step(**sequence)["gradient"], atol=1e-6)
    assert not torch.allclose(both["gradient"], plain["gradient"], atol=1e-6)


@pytest.mark.parametrize("loss", ["aux_loss", "global_aux_loss", ["seq_aux_loss", "aux_loss"]])
def test_another_loss_beside_the_bias_update_is_rejected(one_step: Any, loss: Any) -> None:
    coefficient = [0.1] * len(loss) if isinstance(loss, list) else 0.1
    with pytest.raises(UnsupportedConfig, match="one way or the other"):
        one_step(**UPDATE, moe_router_load_balancing_type=loss, moe_aux_loss_coeff=coefficient)


def test_published_balancing_is_off_until_it_is_set(megatron_bridge: Any, tiny: Any) -> None:
    from megatron.bridge import AutoBridge

    provider = AutoBridge.from_hf_pretrained(tiny("exaone-moe")).to_megatron_provider()

    def balancing() -> tuple[Any, ...]:
        return (
            provider.moe_router_enable_expert_bias,
            provider.moe_router_load_balancing_type,
            provider.moe_aux_loss_coeff,
        )

    assert balancing() == (False, "none", 0.0) and not provider.moe_z_loss_coeff
    provider.set_published_balancing()
    assert balancing() == (True, "seq_aux_loss", 1e-4)
    assert provider.moe_router_bias_update_rate == 1e-4


# --- router replay --------------------------------------------------------------------------------


def _replays(folder: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """Run a model without replay, record, replay, and replay experts of other prompts.

    Returns:
        For each run its logits [1, S, V], and each layer's routing weights [T, E]; the experts that
        were recorded, [T, K] of each layer.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    plain = build(bridge, Layout())
    model = build(bridge, Layout(), moe_enable_routing_replay=True)
    weights: list[torch.Tensor] = []
    for layer in (*plain[0].decoder.layers, *model[0].decoder.layers):
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(
                lambda _, __, output: weights.append(output[0].clone())
            )
    found: dict[str, Any] = {}

    def run(name: str, model: Any, prompt: torch.Tensor, action: Any = None) -> None:
        weights.clear()
        RouterReplay.clear_global_router_replay_action()
        if action is not None:
            RouterReplay.set_global_router_replay_action(action)
        logits = forward_logits(model, prompt)
        assert logits is not None
        found[name] = logits, [*weights]

    run("plain", plain, tokens[:1])
    run("no action", model, tokens[:1])
    run("record", model, tokens[:1], RouterReplayAction.RECORD)
    found["experts"] = [experts.clone() for experts in RouterReplay.get_recorded_data()]
    RouterReplay.set_replay_data(found["experts"])
    run("replay", model, tokens[:1], RouterReplayAction.REPLAY_FORWARD)
    others = [(experts + 1) % 8 for experts in found["experts"]]
    RouterReplay.set_replay_data(others)
    run("others", model, tokens[:1], RouterReplayAction.REPLAY_FORWARD)
    return found


def test_replayed_experts_are_those_recorded(megatron_bridge: Any, tiny: Any) -> None:
    """Recording and replaying change nothing; experts that are set are taken, with their scores."""
    found = ForkLauncher().first(_replays, tiny("exaone-moe"), random_prompts(387, 1, 48))
    logits, weights = found["plain"]
    assert len(weights) == len(found["experts"]) == 3
    for name in ("no action", "record", "replay"):
        assert torch.equal(found[name][0], logits)
        assert all(map(torch.equal, found[name][1], weights))
    for layer, experts in zip(weights, found["experts"], strict=True):
        assert torch.equal(experts.sort().values, layer.nonzero()[:, 1].view_as(experts))
    replayed, other_weights = found["others"]
    assert (replayed - logits).abs().max() > 1e-3
    for layer, experts in zip(other_weights, found["experts"], strict=True):
        others = ((experts + 1) % 8).sort().values
        assert torch.equal(layer.nonzero()[:, 1].view_as(experts), others)
        assert torch.allclose(layer.sum(-1), torch.tensor(2.5))


def _gradients(folder: Path, tokens: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Train one step on the router's own experts, and on others, with and without replay.

    Returns:
        Run -> parameter -> gradient.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    from exaone_bridge.runtime.model import build, forward_logits

    bridge = AutoBridge.from_hf_pretrained(folder)
    positions = torch.arange(tokens.shape[1] - 1)[None]
    found: dict[str, dict[str, torch.Tensor]] = {}

    def train(name: str, model: Any) -> None:
        model.zero_grad()
        loss = model.train()(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        loss.backward()
        found[name] = {
            parameter: value.grad.clone()
            for parameter, value in model.named_parameters()
            if value.grad is not None
        }

    def replay(experts: list[torch.Tensor]) -> None:
        RouterReplay.clear_global_indices()
        RouterReplay.set_replay_data(experts)
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    (plain,) = build(bridge, Layout())
    train("own", plain)
    (model,) = build(bridge, Layout(), moe_enable_routing_replay=True)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    forward_logits([model], tokens[:, :-1])
    own = [experts.clone() for experts in RouterReplay.get_recorded_data()]
    others = [(experts + 1) % 8 for experts in own]
    replay(own)
    train("own, replayed", model)
    replay(others)
    train("others, replayed", model)
    RouterReplay.clear_global_router_replay_instances()
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform"}
    (model,) = build(
        bridge, Layout(), moe_enable_routing_replay=True, recompute_num_layers=1, **recompute
    )
    replay(others)
    train("others, replayed and recomputed", model)
    routers = [layer.mlp.router for layer in plain.decoder.layers if hasattr(layer.mlp, "router")]
    for router, experts in zip(routers, others, strict=True):
        router.top_k = lambda _, experts=experts: experts
    train("others", plain)
    return found


def test_gradients_of_replayed_experts_are_those_of_the_same_experts(
    megatron_bridge: Any, tiny: Any
) -> None:
    """Activation recomputation replays the experts a second time, in the backward pass."""
    found = ForkLauncher().first(_gradients, tiny("exaone-moe"), random_prompts(387, 1, 49))
    for name, same in (
        ("own, replayed", "own"),
        ("others, replayed", "others"),
        ("others, replayed and recomputed", "others"),
    ):
        assert found[name].keys() == found[same].keys()
        worst = max(relative_norm(found[name][each], found[same][each]) for each in found[same])
        print(f"{name}: {worst:.1e}")
        assert worst <= 1e-6
    router = "decoder.layers.1.mlp.router.weight"
    assert found["own"][router].norm() > 0
    assert relative_norm(found["others"][router], found["own"][router]) > 0.1
