"""EXAONE MoE's parameter mappings, and those of its multi-token prediction."""

from __future__ import annotations

import dataclasses

from exaone_bridge.models.exaone_moe.config import ExaoneMoeModelConfig
from exaone_bridge.schema.mapping_groups import (
    attention_mappings,
    embedding_mappings,
    expert_mappings,
    pre_norm_mappings,
    qk_norm_mappings,
    router_mappings,
    shared_expert_mappings,
    swiglu_mappings,
)
from exaone_bridge.schema.mtp_mappings import mtp_mappings
from exaone_bridge.schema.param_mapping import HFTensor, ParamMapping

__all__ = [
    "PASSTHROUGH",
    "exaone_moe_mappings",
    "exaone_moe_mappings_with_mtp",
    "passthrough_tensors",
    "with_fp32_gate",
    "without_passthrough",
]

PASSTHROUGH = r"mtp\..+"  # Transformers' `_keys_to_ignore_on_load_unexpected`


def exaone_moe_mappings(model_config: ExaoneMoeModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of every parameter but those of multi-token prediction."""
    layers, moe_layers = model_config.layers, model_config.moe_layers
    dense = tuple(layer for layer in layers if layer not in moe_layers)
    return (
        *embedding_mappings(tied=model_config.tied),
        *pre_norm_mappings(layers, moe_layers),
        *attention_mappings(layers),
        *qk_norm_mappings(layers),
        *swiglu_mappings(dense),
        *router_mappings(
            moe_layers,
            weight="gate.weight",
            selection_bias="e_score_correction_bias",
            fp32_weight=model_config.moe.fp32_gate,
        ),
        *expert_mappings(moe_layers, model_config.num_experts),
        *shared_expert_mappings(moe_layers),
    )


def exaone_moe_mappings_with_mtp(model_config: ExaoneMoeModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of every parameter."""
    return (*exaone_moe_mappings(model_config), *_mtp(model_config))


def _mtp(model_config: ExaoneMoeModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of the layer, dense and pre-norm, with layer 0's tensor names."""
    first = (0,)
    layer = (
        *pre_norm_mappings(first),
        *attention_mappings(first),
        *qk_norm_mappings(first),
        *swiglu_mappings(first),
    )
    return tuple(mtp_mappings(layer, 0 if model_config.mtp is None else model_config.mtp.depth))


def passthrough_tensors(model_config: ExaoneMoeModelConfig) -> tuple[HFTensor, ...]:
    """Return the tensors of multi-token prediction."""
    return tuple(tensor for mapping in _mtp(model_config) for tensor in mapping.hf)


def without_passthrough(model_config: ExaoneMoeModelConfig) -> ExaoneMoeModelConfig:
    """Return the config of the same model without multi-token prediction."""
    return dataclasses.replace(model_config, mtp=None)


def with_fp32_gate(model_config: ExaoneMoeModelConfig) -> ExaoneMoeModelConfig:
    """Return the config of the same model with the router's weights in fp32 on disk."""
    return dataclasses.replace(
        model_config, moe=dataclasses.replace(model_config.moe, fp32_gate=True)
    )
