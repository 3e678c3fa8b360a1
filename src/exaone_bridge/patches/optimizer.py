"""Lets the distributed optimizer save and load models with parameters of two dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["build_optimizer_group_ranges"]


@patch(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_optimizer_group_ranges",
    version="Megatron-Core 0.19.2",
    reason="_build_model_and_main_param_groups puts a group's fp32 parameters first, but this "
    "method numbers them in the order of the gradient buffers; in a group with both dtypes "
    "(ERNIE's router is fp32) states are saved and loaded under the wrong parameter.",
)
def build_optimizer_group_ranges(
    original: Callable[..., Any], cls: type, *args: object, **kwargs: object
) -> tuple[dict[Any, tuple[int, int]], list[JSONObject]]:
    """Assign numbers to the parameters of a group: those in fp32 come first, where some stay fp32.

    Returns:
        Parameter -> (group, number in it), and the groups.
    """
    from exaone_bridge.modules.router import stays_fp32

    numbers, ranges = original(cls, *args, **kwargs)
    for index, group in enumerate(ranges):
        parameters = group["params"]
        if any(stays_fp32(parameter) for parameter in parameters):
            parameters.sort(key=lambda parameter: parameter.dtype != torch.float32)
            numbers |= {parameter: (index, number) for number, parameter in enumerate(parameters)}
    return numbers, ranges
