"""The size that a difference is relative to, with few values and with many."""

from __future__ import annotations

import torch

from exaone_bridge.verification.activations.compare import relative_difference


def test_a_reward_near_zero_is_no_large_difference() -> None:
    """Rounding of a sum whose terms cancel is as large as that of any other reward."""
    rewards = torch.tensor([[[2.0], [1e-7]]])
    assert relative_difference(rewards, rewards + 1e-6).max() < 1e-6
    logits = rewards.expand(1, 2, 8)
    assert relative_difference(logits, logits + 1e-6).max() > 1
