"""LoRA and DoRA on linears that have a norm on their output (post-norm) or on their input.

Every adapter wrapper of Megatron-Bridge is an `AdapterWrapper` that calls the linear it wraps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exaone_bridge.patches.dora import reject_inexact_dora
from exaone_bridge.patches.patch import patch, patch_value

__all__ = ["have_te", "init_adapter_wrapper"]


@patch_value(
    "megatron.bridge.peft.utils:HAVE_TE",
    version="Megatron-Bridge 0.6.2",
    reason="It is true without Transformer Engine too, because Megatron-Core defines its "
    "Transformer Engine classes as None; an isinstance check against None then raises.",
)
def have_te(_: bool) -> bool:
    """Return whether Transformer Engine is installed."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


@patch(
    "megatron.bridge.peft.adapter_wrapper:AdapterWrapper.__init__",
    version="Megatron-Bridge 0.6.2",
    reason="Wrappers add the adapter's output to the linear's output. A post-norm linear's output "
    "is already normalised, but an export merges the adapter into the weight, before the norm. And "
    "the normalised input of a linear with a norm on its input is requested from Transformer "
    "Engine's class only.",
)
def init_adapter_wrapper(
    original: Callable[..., None],
    self: Any,
    to_wrap: torch.nn.Module,
    adapter: torch.nn.Module,
) -> None:
    """Make the wrapper apply a post-norm after the adapter, and the torch linear return its input.

    Raises:
        UnsupportedConfig: see `reject_inexact_dora`.
    """
    from exaone_bridge.modules.post_norm import PostNorm
    from exaone_bridge.modules.pre_norm import TorchLayerNormColumnParallelLinear

    reject_inexact_dora(self, to_wrap, adapter)
    original(self, to_wrap, adapter)
    if isinstance(to_wrap, PostNorm):
        to_wrap.norm_is_deferred = True
        self.register_forward_hook(_apply_post_norm)
    elif isinstance(to_wrap, TorchLayerNormColumnParallelLinear):
        to_wrap.return_layernorm_output = True


def _apply_post_norm(
    wrapper: torch.nn.Module, _: Any, output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    return wrapper.to_wrap.post_layernorm(output[0]), output[1]
