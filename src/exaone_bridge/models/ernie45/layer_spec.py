"""Layer specs of ERNIE 4.5: pre-norm layers, dense or mixture of experts, for either backend."""

from __future__ import annotations

import functools

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
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from exaone_bridge.models.ernie45.router import Ernie45Router
from exaone_bridge.modules.backend import Backend, resolve_backend
from exaone_bridge.modules.causal_layer import CausalTransformerLayer
from exaone_bridge.modules.moe import moe_layer_builder
from exaone_bridge.modules.moe_provider import MoEModelProvider
from exaone_bridge.modules.rotary_attention import Fp32RotarySelfAttention

__all__ = ["ernie45_block_spec", "ernie45_layer_spec"]


def ernie45_layer_spec(backend: Backend, *, is_moe: bool, bias: bool) -> ModuleSpec:
    """Build the spec of one layer.

    The second norm is fused into the first linear of a dense MLP; in a MoE layer it is a module of
    its own, before the router.

    Args:
        backend: the module classes.
        is_moe: whether the layer has experts instead of a dense MLP.
        bias: whether shared experts have biases.
    """
    if is_moe:
        mlp = moe_layer_builder(backend, Ernie45Router, shared_bias=bias)
    else:
        linears = MLPSubmodules(
            backend.column_linear_pre_norm, backend.row_linear, backend.activation
        )
        mlp = functools.partial(MLP.as_mlp_submodule, submodules=linears)
    return ModuleSpec(
        module=CausalTransformerLayer,
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
            pre_mlp_layernorm=backend.norm if is_moe else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def ernie45_block_spec(
    config: MoEModelProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Build the specs of a pipeline stage's layers, and of the final norm.

    Args:
        config: the provider, which has the dense and MoE layers of the full model.
        vp_stage: the virtual pipeline stage.
    """
    backend = resolve_backend(config.backend)
    first = get_transformer_layer_offset(config, vp_stage)
    specs = [
        ernie45_layer_spec(backend, is_moe=config.is_moe_layer(layer), bias=config.add_bias_linear)
        for layer in range(first, first + get_num_layers_to_build(config, vp_stage))
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=backend.norm)
