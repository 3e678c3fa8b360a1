"""LoRA and DoRA on linears with a norm: the adapter acts before a norm on the output, and after one on the input.

Megatron-Bridge wraps a linear and adds the adapter to what it puts out (`megatron/bridge/peft/lora_layers.py`,
`dora_layers.py`, 0.6.2). Of a post-norm linear that is the normalised output, while an export merges the adapter into
the weight before the norm: what was trained is not what is exported. Every wrapper of the host's is an `AdapterWrapper`
that calls the linear it wraps; so the wrapped linear leaves its norm out, and the wrapper applies it at the end.
Of a linear with a norm on its input the wrapper wants the normalised input back; the host asks Transformer Engine's for
it, and here our torch twin is asked.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from exaone_bridge.modules.post_norm import PostNorm
from exaone_bridge.modules.pre_norm import TorchLayerNormColumnParallelLinear
from exaone_bridge.patches.dora import make_dora_whole, refuse_inexact_dora

__all__ = ["adapters_before_post_norms"]


def _finish(
    wrapper: torch.nn.Module, _: Any, output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    return wrapper.to_wrap.post_layernorm(output[0]), output[1]


def adapters_before_post_norms() -> None:
    """Teach the host's adapter wrappers about our linears, and its DoRA; doing it again is harmless."""
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
    from megatron.core.extensions.transformer_engine import HAVE_TE

    # Megatron-Core has its Transformer Engine classes also where that is missing, so utils.HAVE_TE is always True, and
    # an isinstance against those that are None dies.
    utils.HAVE_TE = HAVE_TE
    init = AdapterWrapper.__init__
    if hasattr(init, "_exaone_bridge"):
        return

    @functools.wraps(init)
    def init_and_defer(
        self: AdapterWrapper, to_wrap: torch.nn.Module, adapter: torch.nn.Module
    ) -> None:
        refuse_inexact_dora(self, to_wrap, adapter)
        init(self, to_wrap, adapter)
        if isinstance(to_wrap, PostNorm):
            to_wrap.norm_is_deferred = True
            self.register_forward_hook(_finish)
        elif isinstance(to_wrap, TorchLayerNormColumnParallelLinear):
            to_wrap.return_layernorm_output = True

    init_and_defer._exaone_bridge = True  # type: ignore[attr-defined]
    AdapterWrapper.__init__ = init_and_defer
    make_dora_whole()
