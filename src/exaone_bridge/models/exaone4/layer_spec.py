"""Layer specs of EXAONE 4.0: post-norm and QK norm, for either backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from exaone_bridge.modules.backend import Backend, resolve_backend
from exaone_bridge.modules.causal_layer import CausalTransformerLayer

if TYPE_CHECKING:
    from exaone_bridge.modules.provider import ExactGPTModelProvider

__all__ = ["exaone4_block_spec", "exaone4_layer_spec"]


def exaone4_layer_spec(backend: Backend) -> ModuleSpec:
    """Build the spec of one layer.

    Sliding windows and RoPE are not part of it: Megatron-Core looks them up in the config by the
    global layer number.
    """
    return ModuleSpec(
        module=CausalTransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=backend.fused_attention or SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_linear,
                    core_attention=backend.core_attention,
                    linear_proj=backend.row_linear_post_norm,
                    q_layernorm=backend.norm,
                    k_layernorm=backend.norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    backend.column_linear, backend.row_linear_post_norm, backend.activation
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def exaone4_block_spec(
    config: ExactGPTModelProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Build the specs of a pipeline stage's layers, and of the final norm.

    Megatron-Core chooses the final norm by what is installed; here it is the backend's.

    Args:
        config: the provider.
        vp_stage: the virtual pipeline stage.
    """
    backend = resolve_backend(config.backend)
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[exaone4_layer_spec(backend)] * count, layer_norm=backend.norm
    )
