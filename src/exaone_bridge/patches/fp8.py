"""Weights loaded into FP8 parameters become the optimizer's fp32 weights as they were read, not what was there before.

Transformer Engine keeps, beside an FP8 parameter, the values it was initialised with; Megatron-Core's distributed
optimizer makes its main weights of those (`distrib_optimizer.py`, `_build_model_and_main_param_groups`). A load from
Hugging Face copies into the FP8 parameter only, so that the first step would put back values from before the load,
which without initialisation is whatever memory held: the loss was NaN from the second step on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import unwrap_model

__all__ = ["initial_values_renewed", "remembers"]


_VALUES = "_high_precision_init_val"  # transformer_engine/pytorch/module/base.py


def remembers(parameter: torch.Tensor) -> bool:
    """Whether Transformer Engine keeps, beside this parameter, the values that it was initialised with."""
    return getattr(parameter, _VALUES, None) is not None


@contextlib.contextmanager
def initial_values_renewed(bridge: Any, model: list[Any]) -> Iterator[None]:
    """Around a load: what FP8 parameters remember is afterwards what was loaded, before it was rounded to FP8.

    Args:
        bridge: the MegatronModelBridge that loads; the host keeps unrounded weights where it exports FP8, and is asked
            to for the time of this load.
        model: this rank's chunks.
    """
    remembering = [
        (chunk, name, parameter)
        for chunk, module in enumerate(unwrap_model(model))
        for name, parameter in module.named_parameters()
        if remembers(parameter)
    ]
    if not remembering:
        yield
        return
    wished = getattr(bridge, "export_weight_dtype", "bf16")
    bridge.export_weight_dtype = "fp8"
    try:
        yield
    finally:
        bridge.export_weight_dtype = wished
    loaded = bridge.unquantized_state_dict or {}
    for chunk, name, parameter in remembering:
        values = loaded["model" if len(model) == 1 else f"model{chunk}"][name]
        remembered: torch.Tensor = getattr(parameter, _VALUES)
        setattr(parameter, _VALUES, values.to(remembered))
    if wished != "fp8":
        bridge.unquantized_state_dict = None
