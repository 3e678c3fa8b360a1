"""EXAONE 4.0's rows: Megatron-Core name <-> Hugging Face name."""

from __future__ import annotations

from exaone_bridge.models.exaone4.config import Exaone4ModelConfig
from exaone_bridge.schema.param_mapping import (
    ParamMapping,
    embeddings,
    gqa,
    post_norm,
    qk_norm,
    swiglu,
)

__all__ = ["exaone4_mappings"]


def exaone4_mappings(model_config: Exaone4ModelConfig) -> tuple[ParamMapping, ...]:
    """Every parameter of an EXAONE 4.0 model: norms on q, k and on the sublayers' outputs, none before them."""
    layers = model_config.layers
    return (
        *embeddings(tied=model_config.tied),
        *gqa(layers),
        *qk_norm(layers),
        *swiglu(layers),
        *post_norm(layers, attention="post_attention_layernorm", mlp="post_feedforward_layernorm"),
    )
