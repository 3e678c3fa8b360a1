"""Backends: the module classes that build a layer. Both backends have the same parameter names."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
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

if HAVE_TE:  # Triton comes with it
    from exaone_bridge.modules.fused_attention import FusedSelfAttention
    from exaone_bridge.modules.kernels.swiglu import SwiGLU

__all__ = [
    "TORCH",
    "TRANSFORMER_ENGINE",
    "Backend",
    "exact_cross_entropy_impl",
    "resolve_backend",
    "unsupported_fusions",
]


@dataclass(frozen=True, slots=True)
class Backend:
    """The module classes of one backend, with Megatron-Core's constructor signatures.

    Attributes:
        name: "torch" or "transformer_engine".
        column_linear, row_linear: column- and row-parallel linears.
        column_linear_pre_norm: column-parallel linear with RMSNorm on its input.
        row_linear_post_norm: row-parallel linear with RMSNorm on its output.
        core_attention: attention of projected queries, keys and values.
        fused_attention: self-attention with the fused kernel for QK norm and RoPE; None: the
            model's own self-attention class is used.
        norm: RMSNorm.
        activation: the module that computes SwiGLU with `use_te_activation_func`; None: the MLP
            computes it in torch.
        build_experts: returns the builder of a MoE layer's routed experts.
    """

    name: str
    column_linear: type[torch.nn.Module]
    column_linear_pre_norm: type[torch.nn.Module]
    row_linear: type[torch.nn.Module]
    row_linear_post_norm: type[torch.nn.Module]
    core_attention: type[torch.nn.Module]
    fused_attention: type[SelfAttention] | None
    norm: type[torch.nn.RMSNorm]
    activation: type[torch.nn.Module] | None
    build_experts: Callable[[], Callable[..., torch.nn.Module]]


def _sequential_experts() -> Callable[..., torch.nn.Module]:
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return functools.partial(SequentialMLP, submodules=linears)


def _grouped_experts() -> Callable[..., torch.nn.Module]:
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
    build_experts=_sequential_experts,
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
        build_experts=_grouped_experts,
    )
    if HAVE_TE
    else None
)

# TransformerConfig's switches for CUDA kernels, Transformer Engine, apex, or torch.compile.
_CUDA_FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "moe_permute_fusion",
    "persist_layer_norm",
)


def unsupported_fusions(backend: Backend) -> tuple[str, ...]:
    """List TransformerConfig's fusion switches that this backend cannot use on this machine."""
    if backend is TORCH:
        return _CUDA_FUSIONS
    # The output layer is Megatron-Core's own linear, which fuses gradient accumulation with apex
    # only; Megatron-Bridge 0.6.2 turns the fusion on wherever Transformer Engine is installed
    # (`megatron/bridge/utils/fusions.py`).
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return ("gradient_accumulation_fusion",)
    return ()


def exact_cross_entropy_impl(backend: Backend, dtype: torch.dtype) -> str:
    """Choose the exact `cross_entropy_fusion_impl` for logits of this dtype: "te" or "native".

    Before 2.20 Transformer Engine rounded gradients to bf16 between its passes, which is why
    Megatron-Core 0.19.2 still warns of it (TransformerEngine pull requests 3193 and 3273). It does
    not support fp16.
    """
    exact = backend is not TORCH and is_te_min_version("2.20.0") and dtype is not torch.float16
    return "te" if exact else "native"


def resolve_backend(name: str = "auto") -> Backend:
    """Look up a backend.

    Args:
        name: "torch", "transformer_engine", or "auto" for Transformer Engine where it is installed
            and there is a GPU.

    Raises:
        UnsupportedConfig: the name is unknown, or Transformer Engine is not installed.
    """
    if name == "auto":
        use_te = TRANSFORMER_ENGINE is not None and torch.cuda.is_available()
        name = "transformer_engine" if use_te else "torch"
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
