"""The rule for bf16 logits (`tests/helpers/bf16.py`) passes sound models, and can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.runtime.fork import ForkLauncher
from exaone_bridge.verification.self_test.fault import changed_model
from tests.helpers.bf16 import Closeness, Outputs, assert_bf16_close, hf_outputs
from tests.helpers.gpu import long_prompts, megatron_outputs, wide

TOKENS, VOCAB, EXPERTS = 400, 64, 8


def _outputs(noise: float = 0.0, seed: int = 0, spreads: bool = False) -> Outputs:
    """Return the same logits and experts for every seed, with other noise on the logits."""
    logits, own = (
        torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(each))
        for each in (0, seed)
    )
    chosen = torch.arange(TOKENS)[:, None] % EXPERTS == torch.arange(EXPERTS)
    return Outputs(logits + noise * own, chosen, spreads)


def _elsewhere(outputs: Outputs, count: int) -> Outputs:
    """Send the first tokens to other experts, which changes their logits altogether."""
    experts, logits = outputs.experts.clone(), outputs.logits.clone()
    experts[:count] = experts[:count].roll(1, -1)
    logits[:count] += 10.0
    return Outputs(logits, experts, outputs.spreads)


HF = _outputs(0.01, seed=1)


def test_tokens_that_go_elsewhere_are_counted_and_not_compared() -> None:
    megatron = _elsewhere(_outputs(0.01, seed=2), 9)
    closeness = Closeness.of(megatron, HF, _outputs())
    assert closeness.megatron_elsewhere == 9 and closeness.hf_elsewhere == 0
    assert closeness.compared == TOKENS - 9 and closeness.megatron.max < 0.1
    assert not closeness.failures()
    assert_bf16_close("synthetic", megatron, HF, _outputs())


def test_more_tokens_elsewhere_than_chance_explains_fail() -> None:
    (failure,) = Closeness.of(_elsewhere(_outputs(0.01), 20), HF, _outputs()).failures()
    assert failure.startswith("tokens that go to other experts: 20")
    hf = _elsewhere(HF, 20)
    assert not Closeness.of(_elsewhere(_outputs(0.01), 35), hf, _outputs()).failures()
    assert Closeness.of(_elsewhere(_outputs(0.01), 80), hf, _outputs()).failures()


def test_larger_differences_fail() -> None:
    failures = Closeness.of(_outputs(0.012, seed=2), HF, _outputs()).failures()
    assert failures and failures[0].startswith("the mean of the differences")


def test_maximum_is_bounded_unless_tokens_attend_to_others_that_went_elsewhere() -> None:
    one_token = _outputs(0.01, seed=2)
    assert_bf16_close("dense", one_token.logits, HF.logits, _outputs().logits)
    one_token.logits[7, 7] += 0.2
    with pytest.raises(AssertionError, match="the max of the differences"):
        assert_bf16_close("dense", one_token.logits, HF.logits, _outputs().logits)
    with pytest.raises(AssertionError, match="the max of the differences"):
        assert_bf16_close("experts in the last layer", one_token, HF, _outputs())
    assert_bf16_close("experts below", one_token, HF, _outputs(spreads=True))
    one_token.logits[::5, 7] += 0.2
    with pytest.raises(AssertionError, match="the quantile of the differences"):
        assert_bf16_close("experts below", one_token, HF, _outputs(spreads=True))


def test_no_token_in_common_is_an_error() -> None:
    with pytest.raises(AssertionError, match="None of 400 tokens"):
        Closeness.of(_elsewhere(HF, TOKENS), HF, _outputs())


# --- models ---------------------------------------------------------------------------------------


def _moe_layers(model: Any) -> list[Any]:
    return [layer.mlp for layer in model[0].decoder.layers if hasattr(layer.mlp, "router")]


def _scale_an_expert(model: Any) -> None:
    for mlp in _moe_layers(model):
        mlp.experts.local_experts[3].linear_fc2.weight.mul_(1.5)


def _drop_selection_bias(model: Any) -> None:
    for mlp in _moe_layers(model):
        mlp.router.expert_bias.zero_()


FAULTS: dict[str, Callable[[Any], None]] = {
    "none": lambda model: None,
    "an expert scaled by 1.5": _scale_an_expert,
    "selection bias dropped": _drop_selection_bias,
}


def _closeness_of(folder: Path) -> dict[str, Closeness]:
    """Return fault -> closeness of a bf16 model."""
    runs = long_prompts(folder, count=2)
    reference, hf = (hf_outputs(folder, runs, each) for each in (torch.float32, torch.bfloat16))
    found = {}
    for name, change in FAULTS.items():
        with changed_model(change):
            megatron = megatron_outputs(folder, runs, torch.bfloat16, "torch")
        found[name] = Closeness.of(megatron, hf, reference)
    return found


@pytest.mark.parametrize("name", ["exaone-moe", "ernie45"])
def test_rule_passes_a_sound_model_and_fails_a_faulty_one(
    megatron_bridge: Any, tiny: Any, name: str
) -> None:
    found = ForkLauncher().first(_closeness_of, tiny(name, **wide(name, "bfloat16")))
    for fault, closeness in found.items():
        print(name, fault, closeness, closeness.failures())
    assert found["none"].hf_elsewhere > 0  # there is something to leave out
    assert not found["none"].failures()
    assert any("mean" in each for each in found["an expert scaled by 1.5"].failures())
    assert any("go to other" in each for each in found["selection bias dropped"].failures())
