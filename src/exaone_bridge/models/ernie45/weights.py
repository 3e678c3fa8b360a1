"""ERNIE 4.5's parameter mappings, and the passthrough tensors of its checkpoints."""

from __future__ import annotations

import dataclasses

from exaone_bridge.models.ernie45.config import Ernie45ModelConfig
from exaone_bridge.schema.mapping_groups import (
    attention_mappings,
    embedding_mappings,
    expert_mappings,
    pre_norm_mappings,
    router_mappings,
    shared_expert_mappings,
    swiglu_mappings,
)
from exaone_bridge.schema.param_mapping import HFTensor, ParamMapping

__all__ = ["PASSTHROUGH", "ernie45_mappings", "passthrough_tensors", "without_passthrough"]

# Multi-token prediction, which the 21B has on disk and Transformers ignores
# (`_keys_to_ignore_on_load_unexpected`).
PASSTHROUGH = r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.\d+\..+"


def ernie45_mappings(model_config: Ernie45ModelConfig) -> tuple[ParamMapping, ...]:
    """Return the mappings of every parameter: pre-norm, with dense and MoE layers."""
    layers, bias, moe = model_config.layers, model_config.bias, model_config.moe
    moe_layers = model_config.moe_layers
    mappings = (
        *embedding_mappings(tied=model_config.tied, bias=model_config.head_bias),
        *pre_norm_mappings(layers, moe_layers),
        *attention_mappings(layers, bias=bias),
        *swiglu_mappings(tuple(layer for layer in layers if layer not in moe_layers), bias=bias),
    )
    if moe is None:
        return mappings
    return (
        *mappings,
        *router_mappings(
            moe_layers,
            weight="gate.weight",
            selection_bias="moe_statics.e_score_correction_bias",
            squeezed=True,
        ),
        *expert_mappings(moe_layers, moe.num_experts),
        *(shared_expert_mappings(moe_layers, bias=bias) if moe.num_shared_experts else ()),
    )


def without_passthrough(model_config: Ernie45ModelConfig) -> Ernie45ModelConfig:
    """Return the config of the same model without multi-token prediction on disk."""
    return dataclasses.replace(model_config, mtp=None)


def passthrough_tensors(model_config: Ernie45ModelConfig) -> tuple[HFTensor, ...]:
    """Return the tensors of multi-token prediction: a dense block and its three inputs a layer."""
    shapes = {
        "mtp_block.*.input_layernorm.weight": "H",
        "mtp_block.*.post_attention_layernorm.weight": "H",
        "mtp_block.*.self_attn.q_proj.weight": "QH",
        "mtp_block.*.self_attn.k_proj.weight": "KH",
        "mtp_block.*.self_attn.v_proj.weight": "KH",
        "mtp_block.*.self_attn.o_proj.weight": "HQ",
        "mtp_block.*.mlp.gate_proj.weight": "FH",
        "mtp_block.*.mlp.up_proj.weight": "FH",
        "mtp_block.*.mlp.down_proj.weight": "HF",
        "mtp_emb_norm.*.weight": "H",
        "mtp_hidden_norm.*.weight": "H",
        "mtp_linear_proj.*.weight": "HJ",
    }
    num_layers = 0 if model_config.mtp is None else model_config.mtp.num_layers
    return tuple(
        HFTensor(f"model.{name}", axes).numbered(layer)
        for layer in range(num_layers)
        for name, axes in shapes.items()
    )
