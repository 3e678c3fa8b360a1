"""Backends: which classes build a layer. Parameter names are the same in both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TENorm,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.parts.attention import TorchDotProductAttention
from exaone_bridge.parts.norm import TorchRMSNorm
from exaone_bridge.parts.post_norm import RowParallelLinearLayerNorm, TERowParallelLinearLayerNorm

__all__ = ["NEEDS_CUDA", "TORCH", "TRANSFORMER_ENGINE", "Backend", "resolve_backend"]


@dataclass(frozen=True, slots=True)
class Backend:
    """The classes of one backend, with Megatron-Core's constructor signatures."""

    name: str
    column_linear: type
    row_linear_post_norm: type
    core_attention: type
    norm: type


TORCH = Backend("torch", ColumnParallelLinear, RowParallelLinearLayerNorm, TorchDotProductAttention, TorchRMSNorm)
TRANSFORMER_ENGINE = (
    Backend("transformer_engine", TEColumnParallelLinear, TERowParallelLinearLayerNorm, TEDotProductAttention, TENorm)
    if HAVE_TE
    else None
)

# TransformerConfig's switches for CUDA kernels, apex, or torch.compile; the torch backend runs without.
NEEDS_CUDA = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def resolve_backend(name: str = "auto") -> Backend:
    """The backend of that name; `auto`: Transformer Engine where it is installed and there is a GPU to run it.

    Raises:
        UnsupportedConfig: an unknown name, or Transformer Engine asked for where it is not installed.
    """
    if name == "auto":
        return TRANSFORMER_ENGINE if TRANSFORMER_ENGINE is not None and torch.cuda.is_available() else TORCH
    if name == "torch":
        return TORCH
    if name == "transformer_engine" and TRANSFORMER_ENGINE is not None:
        return TRANSFORMER_ENGINE
    known = ("auto", "torch") + (("transformer_engine",) if TRANSFORMER_ENGINE is not None else ())
    raise UnsupportedConfig(
        "backend",
        got=name,
        known=known,
        where="provider",
        remedy="" if HAVE_TE else "Transformer Engine is not installed here",
    )
