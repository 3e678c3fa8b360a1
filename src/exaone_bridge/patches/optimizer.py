"""Checkpoints of a distributed optimizer whose parameters are of two types, as a mixture of experts' are.

ERNIE's router keeps its weights in fp32. Megatron-Core 0.19's `DistributedOptimizer` puts a group's fp32 parameters
before the others when it makes the optimizer's list (`_build_model_and_main_param_groups`), but remembers each one's
place as it was in the gradient buffers (`_build_optimizer_group_ranges`). Where a group holds both, states are saved
and loaded under the wrong parameter; as a rule an assertion about shapes ends the save.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

__all__ = ["optimizer_places_right"]


def optimizer_places_right() -> None:
    """Make both of Megatron-Core's orders the same: fp32 parameters first. Doing it again is harmless."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    build = DistributedOptimizer._build_optimizer_group_ranges.__func__
    if hasattr(build, "_exaone_bridge"):
        return

    @functools.wraps(build)
    def build_fp32_first(
        cls: type, *args: Any, **kwargs: Any
    ) -> tuple[dict[Any, tuple[int, int]], list[dict]]:
        _, ranges = build(cls, *args, **kwargs)
        places: dict[Any, tuple[int, int]] = {}
        for index, group in enumerate(ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            places |= {parameter: (index, place) for place, parameter in enumerate(group["params"])}
        return places, ranges

    build_fp32_first._exaone_bridge = True  # type: ignore[attr-defined]
    DistributedOptimizer._build_optimizer_group_ranges = classmethod(build_fp32_first)
