"""EXAONE MoE's layers: pre-norm with QK norm, dense or a mixture of experts."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from exaone_bridge.models.exaone_moe.router import ExaoneMoeRouter
from exaone_bridge.modules.backend import Backend, resolve_backend
from exaone_bridge.modules.causal_layer import CausalLayer, CausalTransformerLayer
from exaone_bridge.modules.moe import moe_layer_builder

if TYPE_CHECKING:
    from exaone_bridge.models.exaone_moe.provider import ExaoneMoeModelProvider

__all__ = ["LayerWithOwnLimits", "exaone_moe_block_spec", "exaone_moe_layer_spec"]


class LayerWithOwnLimits(CausalLayer, TransformerLayer):
    """A layer with its own window and its own SwiGLU clamp.

    Megatron-Core's config has one `window_size` and one `activation_func_clamp_value` for all
    layers (transformer_config.py, 0.19.2), so the layer gets a copy of the config.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: object,
        window: int | None,
        swiglu_limit: float,
        **kwargs: object,
    ) -> None:
        own = copy.copy(config)
        if window is not None:
            own.window_size = (window - 1, 0)
        own.activation_func_clamp_value = swiglu_limit or None
        super().__init__(own, *args, **kwargs)


def exaone_moe_layer_spec(backend: Backend, *, moe: bool) -> ModuleSpec:
    """Return the spec of one layer.

    The second norm of a dense layer is fused into its MLP; in an MoE layer it stands before the
    router. Window and RoPE come from the config, by global layer number.
    """
    mlp = (
        moe_layer_builder(backend, ExaoneMoeRouter, shared_bias=False)
        if moe
        else functools.partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(
                backend.column_linear_pre_norm, backend.row_linear, backend.activation
            ),
        )
    )
    return ModuleSpec(
        module=CausalTransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=backend.fused_attention or SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_linear_pre_norm,
                    core_attention=backend.core_attention,
                    linear_proj=backend.row_linear,
                    q_layernorm=backend.norm,
                    k_layernorm=backend.norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.norm if moe else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def exaone_moe_block_spec(
    config: ExaoneMoeModelProvider, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the layers of this rank's pipeline stage (of its model chunk `vp_stage`)."""
    backend = resolve_backend(config.backend)
    first = get_transformer_layer_offset(config, vp_stage)
    specs = []
    for layer in range(first, first + get_num_layers_to_build(config, vp_stage)):
        spec = exaone_moe_layer_spec(backend, moe=config.is_moe_layer(layer))
        if config.layer_windows or config.swiglu_limits:
            spec.module = LayerWithOwnLimits
            spec.params = {
                "window": config.layer_windows[layer] or None if config.layer_windows else None,
                "swiglu_limit": config.swiglu_limits[layer]
                if config.swiglu_limits
                else config.activation_func_clamp_value or 0.0,
            }
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=backend.norm)
