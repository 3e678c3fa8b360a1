"""Backends: which classes build a layer. Parameter names are the same in both."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, SequentialMLP
from megatron.core.utils import is_te_min_version

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.attention import TorchDotProductAttention
from exaone_bridge.modules.grouped_experts import (
    ColumnParallelGroupedLinear,
    GroupedExperts,
    RowParallelGroupedLinear,
)
from exaone_bridge.modules.norm import FusedRMSNorm, TorchRMSNorm
from exaone_bridge.modules.post_norm import RowParallelLinearLayerNorm, TERowParallelLinearLayerNorm
from exaone_bridge.modules.pre_norm import TorchLayerNormColumnParallelLinear

if HAVE_TE:  # which brings Triton
    from exaone_bridge.modules.fused_attention import FusedSelfAttention
    from exaone_bridge.modules.kernels.swiglu import SwiGLU

__all__ = [
    "TORCH",
    "TRANSFORMER_ENGINE",
    "Backend",
    "cannot_run",
    "cross_entropy",
    "resolve_backend",
]


@dataclass(frozen=True, slots=True)
class Backend:
    """The classes of one backend, with Megatron-Core's constructor signatures.

    Attributes:
        column_linear_pre_norm, row_linear_post_norm: linears with the norm on their input, or on their output.
        fused_attention: self-attention that splits, normalises and rotates at once; None: the family's own.
        activation: what computes SwiGLU where `use_te_activation_func` is set; None: the linears' own torch code.
        experts: () -> the builder of a MoE layer's routed experts.
    """

    name: str
    column_linear: type
    column_linear_pre_norm: type
    row_linear: type
    row_linear_post_norm: type
    core_attention: type
    fused_attention: type | None
    norm: type
    activation: type | None
    experts: Callable[[], Any]


def _sequential_experts() -> Any:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return functools.partial(SequentialMLP, submodules=linears)


def _grouped_experts() -> Any:
    linears = GroupedMLPSubmodules(
        linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear
    )
    return functools.partial(GroupedExperts, submodules=linears)


TORCH = Backend(
    name="torch",
    column_linear=ColumnParallelLinear,
    column_linear_pre_norm=TorchLayerNormColumnParallelLinear,
    row_linear=RowParallelLinear,
    row_linear_post_norm=RowParallelLinearLayerNorm,
    core_attention=TorchDotProductAttention,
    fused_attention=None,
    norm=TorchRMSNorm,
    activation=None,
    experts=_sequential_experts,
)
TRANSFORMER_ENGINE = (
    Backend(
        name="transformer_engine",
        column_linear=TEColumnParallelLinear,
        column_linear_pre_norm=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        row_linear_post_norm=TERowParallelLinearLayerNorm,
        core_attention=TEDotProductAttention,
        fused_attention=FusedSelfAttention,
        norm=FusedRMSNorm,
        activation=SwiGLU,
        experts=_grouped_experts,
    )
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


def cross_entropy(backend: Backend, dtype: torch.dtype) -> str:
    """The exact one of Megatron-Core's fused cross entropies for logits of this type: `te` or `native`.

    Transformer Engine's rounded gradients to bf16 between its passes before 2.20, which is why Megatron-Core 0.19 still
    warns of it (TransformerEngine pull requests 3193 and 3273); it takes no fp16.
    """
    exact = backend is not TORCH and is_te_min_version("2.20.0") and dtype is not torch.float16
    return "te" if exact else "native"


def resolve_backend(name: str = "auto") -> Backend:
    """The backend of that name; `auto`: Transformer Engine where it is installed and there is a GPU to run it.

    Raises:
        UnsupportedConfig: an unknown name, or Transformer Engine asked for where it is not installed.
    """
    if name == "auto":
        return (
            TRANSFORMER_ENGINE
            if TRANSFORMER_ENGINE is not None and torch.cuda.is_available()
            else TORCH
        )
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
