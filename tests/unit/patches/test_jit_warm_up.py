"""A run of our models starts without the fused kernels that they do not call."""

from __future__ import annotations

from typing import Any

import torch


def test_nothing_is_compiled_before_the_first_step(megatron_bridge: Any) -> None:
    """The warm-up would compile, and fail here: it makes tensors on a GPU."""
    from megatron.bridge.training.initialize import set_jit_fusion_options

    from exaone_bridge.recipes import exaone4_tiny_pretrain_config

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    set_jit_fusion_options(exaone4_tiny_pretrain_config().model, 2)
    assert not torch._dynamo.utils.counters["frames"]
