"""EXAONE 4.0's rows: Megatron-Core name <-> Hugging Face name."""

from __future__ import annotations

from exaone_bridge.models.exaone4.config import Exaone4Facts
from exaone_bridge.schema.param_mapping import Row, embeddings, gqa, post_norm, qk_norm, swiglu

__all__ = ["exaone4_rows"]


def exaone4_rows(facts: Exaone4Facts) -> tuple[Row, ...]:
    """Every parameter of an EXAONE 4.0 model: norms on q, k and on the sublayers' outputs, none before them."""
    layers = facts.layers
    return (
        *embeddings(tied=facts.tied),
        *gqa(layers),
        *qk_norm(layers),
        *swiglu(layers),
        *post_norm(layers, attention="post_attention_layernorm", mlp="post_feedforward_layernorm"),
    )
