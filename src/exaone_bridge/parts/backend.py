"""Backends: which classes build a layer. Parameter names are the same in both."""

from __future__ import annotations

import importlib.util
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

__all__ = ["TORCH", "TRANSFORMER_ENGINE", "Backend", "cannot_run", "resolve_backend"]


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
_NEEDS_CUDA = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def cannot_run(backend: Backend) -> tuple[str, ...]:
    """The switches of TransformerConfig that must be off with this backend on this machine."""
    if backend is TORCH:
        return _NEEDS_CUDA
    # The output layer is Megatron-Core's own linear, which fuses through apex alone; Megatron-Bridge asks for the
    # fusion wherever Transformer Engine is installed (`megatron/bridge/utils/fusions.py`).
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return ("gradient_accumulation_fusion",)
    return ()


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
