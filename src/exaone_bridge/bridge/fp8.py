"""Gives FP8 parameters the loaded values as the optimizer's fp32 main weights.

Beside an FP8 parameter, Transformer Engine keeps the values that it was initialised with, and
Megatron-Core's distributed optimizer makes its main weights of them (`distrib_optimizer.py`,
`_build_model_and_main_param_groups`, 0.19.2). Megatron-Bridge's load copies into the FP8 parameter
only; the first optimizer step would restore the values from before the load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

__all__ = ["has_fp8_init_value", "updated_fp8_init_values"]

_INIT_VALUE = "_high_precision_init_val"  # transformer_engine/pytorch/module/base.py


def has_fp8_init_value(parameter: torch.Tensor) -> bool:
    """Return whether Transformer Engine keeps the initial value [...] in high precision."""
    return getattr(parameter, _INIT_VALUE, None) is not None


@contextlib.contextmanager
def updated_fp8_init_values(
    bridge: MegatronModelBridge, model: list[MegatronModule]
) -> Iterator[None]:
    """Set initial values of FP8 parameters to those that a load inside brings, before rounding.

    Args:
        bridge: loads the model. It keeps unrounded weights when FP8 is to be exported, which is
            therefore requested during the load.
        model: this rank's chunks.
    """
    parameters = [
        (chunk, name, parameter)
        for chunk, module in enumerate(unwrap_model(model))
        for name, parameter in module.named_parameters()
        if has_fp8_init_value(parameter)
    ]
    if not parameters:
        yield
        return
    requested = getattr(bridge, "export_weight_dtype", "bf16")
    bridge.export_weight_dtype = "fp8"
    try:
        yield
    finally:
        bridge.export_weight_dtype = requested
    loaded = bridge.unquantized_state_dict or {}
    for chunk, name, parameter in parameters:
        value = loaded["model" if len(model) == 1 else f"model{chunk}"][name]
        setattr(parameter, _INIT_VALUE, value.to(getattr(parameter, _INIT_VALUE)))
    if requested != "fp8":
        bridge.unquantized_state_dict = None
