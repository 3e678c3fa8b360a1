"""DoRA under tensor parallelism, and the check that rejects inexact uses of it.

`bridge/dora_export.py` exports DoRA's magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.patches.patch import patch

__all__ = [
    "get_weight_norm",
    "infer_rank_pattern",
    "init_weight_magnitude",
    "reject_inexact_dora",
]

_LORA_SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def reject_inexact_dora(wrapper: torch.nn.Module, linear: torch.nn.Module, adapter: Any) -> None:
    """Reject adapters for which Megatron-Bridge's DoRA is wrong in a way that no patch can repair.

    Raises:
        UnsupportedConfig: DoRA on routed experts, or dropout on a linear with a norm on its input.
    """
    from megatron.bridge.peft.dora_layers import DoRALinear
    from megatron.bridge.peft.utils import is_expert_linear

    from exaone_bridge.modules.provider import is_of_our_model

    if not isinstance(wrapper, DoRALinear) or not is_of_our_model(linear):
        return
    name = adapter.base_linear_name
    if is_expert_linear(name):
        raise UnsupportedConfig(
            "DoRA target_modules",
            got=name,
            wanted="linears outside routed experts",
            where="peft",
            remedy="use LoRA for experts, or name attention's linears (linear_qkv, linear_proj)",
        )
    if not isinstance(adapter.dropout, torch.nn.Identity) and hasattr(linear, "layer_norm_weight"):
        # Its correction for dropout normalises the difference of two normalised inputs again.
        raise UnsupportedConfig(
            "DoRA dropout",
            got=adapter.dropout.p,
            wanted=f"0 on a linear with its norm on its input ({name})",
            where="peft",
            remedy="set dropout=0.0, or use LoRA",
        )


@patch(
    "megatron.bridge.peft.dora_layers:DoRALinear._get_weight_norm",
    version="Megatron-Bridge 0.6.2",
    reason="The norm of a row-parallel weight is that of each tensor-parallel rank's shard, not of "
    "unsharded rows.",
)
def get_weight_norm(original: Callable[..., torch.Tensor], self: Any) -> torch.Tensor:
    """Compute the norm of each row of W + s B A over all tensor-parallel ranks.

    Returns:
        [O / tp] for a column-parallel linear, whose rows are unsharded; [O] for a row-parallel one.
    """
    from exaone_bridge.modules.provider import is_of_our_model

    norm = original(self)
    is_sharded = self.adapter.input_is_parallel and self.adapter.tp_group.size() > 1
    if is_sharded and is_of_our_model(self.to_wrap):
        squares = norm.float().square()
        dist.all_reduce(squares, group=self.adapter.tp_group)
        norm = squares.sqrt().to(norm.dtype)
    return norm


@patch(
    "megatron.bridge.peft.dora_layers:ParallelLinearDoRAAdapter.init_weight_magnitude",
    version="Megatron-Bridge 0.6.2",
    reason="The magnitude lacks the attributes from which Megatron-Core reduces its gradient and "
    "counts it in the gradient norm.",
)
def init_weight_magnitude(original: Callable[..., None], self: Any, value: torch.Tensor) -> None:
    """Make the magnitude from `value` ([O / tp] or [O], see `get_weight_norm`) and mark it."""
    from exaone_bridge.modules.provider import is_of_our_model

    original(self, value)
    if not is_of_our_model(self):
        return
    magnitude = self.weight_magnitude
    if self.input_is_parallel:  # replicated; under sequence parallelism each rank sees some tokens
        magnitude.sequence_parallel = self.config.sequence_parallel
    else:  # sharded like the weight's rows
        magnitude.tensor_model_parallel = True
        magnitude.partition_dim, magnitude.partition_stride = 0, 1


@patch(
    "megatron.bridge.models.conversion.peft_bridge:infer_rank_pattern_from_adapter_weights",
    version="Megatron-Bridge 0.6.2",
    reason="It takes the LoRA rank from the shape of every adapter tensor, which DoRA's magnitudes "
    "do not have.",
)
def infer_rank_pattern(
    original: Callable[..., dict[str, int]], weights: Iterable[Any], **kwargs: object
) -> dict[str, int]:
    """Infer PEFT's `rank_pattern` from the LoRA matrices alone."""
    matrices = [weight for weight in weights if weight.param_name.endswith(_LORA_SUFFIXES)]
    return original(matrices, **kwargs)
