"""The prompts of a verification."""

from __future__ import annotations

import pytest
import torch

from exaone_bridge.verification.workflow.workload import prompt_length, random_prompts


def test_prompts_follow_from_the_seed_and_use_the_whole_vocabulary() -> None:
    tokens = random_prompts(50, 3, 400)
    assert tokens.shape == (3, 400) and tokens.dtype == torch.int64
    assert set(tokens.flatten().tolist()) == set(range(50))
    assert torch.equal(tokens, random_prompts(50, 3, 400))
    assert not torch.equal(tokens, random_prompts(50, 3, 400, seed=1))
    assert not torch.equal(tokens[0], tokens[1])


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
def test_prompts_pass_the_window_and_ropes_original_length_if_affordable(
    windows: tuple[int | None, ...], original: int | None, length: int
) -> None:
    assert prompt_length(windows, original) == length
