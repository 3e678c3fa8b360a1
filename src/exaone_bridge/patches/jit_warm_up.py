"""Starts a training run of our models without compiling kernels that they do not call."""

from __future__ import annotations

from collections.abc import Callable

from exaone_bridge.patches.patch import patch

__all__ = ["warmup_jit_function"]


@patch(
    "megatron.bridge.training.initialize:_warmup_jit_function",
    version="Megatron-Bridge 0.6.2",
    reason="It compiles a bias with SwiGLU, and a bias with dropout and the residual addition, by "
    "torch.compile, which starts a pool of compiler processes; our models have neither bias nor "
    "dropout there, and kernels of their own. What a model does call is compiled by its first "
    "step.",
)
def warmup_jit_function(
    original: Callable[..., object], model_config: object, micro_batch_size: int
) -> None:
    """Skip the warm-up for the providers of exaone_bridge."""
    from exaone_bridge.modules.provider import ExactGPTModelProvider

    if not isinstance(model_config, ExactGPTModelProvider):
        original(model_config, micro_batch_size)
