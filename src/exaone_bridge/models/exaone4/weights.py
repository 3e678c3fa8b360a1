"""EXAONE 4.0's parameter mappings."""

from __future__ import annotations

from exaone_bridge.models.exaone4.config import Exaone4ModelConfig
from exaone_bridge.schema.mapping_groups import (
    attention_mappings,
    embedding_mappings,
    head_mappings,
    post_norm_mappings,
    qk_norm_mappings,
    swiglu_mappings,
)
from exaone_bridge.schema.model_config import HeadKind
from exaone_bridge.schema.param_mapping import ParamMapping

__all__ = ["exaone4_mappings"]


def exaone4_mappings(model_config: Exaone4ModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of every parameter: post-norm layers with QK norm."""
    layers, head = model_config.layers, model_config.head
    mappings = (
        *embedding_mappings(tied=model_config.tied or head is not None),
        *attention_mappings(layers),
        *qk_norm_mappings(layers),
        *swiglu_mappings(layers),
        *post_norm_mappings(
            layers, attention="post_attention_layernorm", mlp="post_feedforward_layernorm"
        ),
    )
    if head is None:
        return mappings
    if head.kind == HeadKind.QUESTION_ANSWERING:
        mappings = tuple(mapping.with_hf_names(_of_question_answering) for mapping in mappings)
    return (*mappings, *head_mappings(head))


def _of_question_answering(name: str) -> str:
    # `Exaone4ForQuestionAnswering.base_model_prefix` (Transformers 5.12.1)
    return "transformer." + name.removeprefix("model.")
