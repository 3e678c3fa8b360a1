"""Megatron-Core models of a bridge before their weights are loaded."""

from __future__ import annotations

from typing import Any

import torch

from exaone_bridge.schema.parallel_layout import Layout


def unwrap_model(model: list[Any]) -> list[Any]:
    """Return the chunks without Megatron-Core's wrappers."""
    from megatron.core.utils import unwrap_model as unwrap

    return list(unwrap(model))


def unloaded_model(
    bridge: Any, layout: Layout, dtype: torch.dtype | None = None, **fields: Any
) -> list[Any]:
    """Build this rank's chunks at a layout, without the weights of the checkpoint.

    Args:
        bridge: the AutoBridge of the model.
        layout: the parallel layout.
        dtype: the data type of the parameters; None: the checkpoint's.
        fields: further fields of the provider.
    """
    provider = bridge.to_megatron_provider(load_weights=False)
    dtype = dtype or provider.params_dtype
    dtypes = {"pipeline_dtype": dtype, "autocast_dtype": dtype}
    provider.apply_overrides_and_finalize(dtype, layout.provider_overrides() | dtypes | fields)
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def named_parameters(model: list[Any]) -> dict[tuple[int, str], torch.Tensor]:
    """Return (chunk, name) -> parameter or persistent buffer of this rank."""
    from exaone_bridge.bridge.eligibility import named_tensors

    return {(chunk, name): tensor for chunk, name, tensor in named_tensors(model)}
