"""ERNIE 4.5's layers: pre-norm, dense or mixture of experts, from either backend's classes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from exaone_bridge.models.ernie45.moe import moe_builder
from exaone_bridge.models.ernie45.router import SelectionBiasRouter
from exaone_bridge.modules.backend import Backend, resolve_backend
from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

if TYPE_CHECKING:
    from exaone_bridge.models.ernie45.provider import Ernie45ModelProvider

__all__ = ["ernie45_block_spec", "ernie45_layer_spec"]


def ernie45_layer_spec(backend: Backend, *, moe: bool, bias: bool) -> ModuleSpec:
    """One layer; a dense one's second norm is fused into its feed-forward, a mixture's stands before the router."""
    mlp = (
        moe_builder(backend, SelectionBiasRouter, shared_bias=bias)
        if moe
        else functools.partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(
                backend.column_linear_pre_norm, backend.row_linear, backend.activation
            ),
        )
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=backend.fused_attention or Fp32RotarySelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_linear_pre_norm,
                    core_attention=backend.core_attention,
                    linear_proj=backend.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm if moe else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def ernie45_block_spec(
    config: Ernie45ModelProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage (of its chunk `vp_stage`), each as the global schedule says."""
    backend = resolve_backend(config.backend)
    first = get_transformer_layer_offset(config, vp_stage)
    here = range(first, first + get_num_layers_to_build(config, vp_stage))
    specs = [
        ernie45_layer_spec(backend, moe=config.is_moe_layer(layer), bias=config.add_bias_linear)
        for layer in here
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=backend.norm)
