"""ERNIE 4.5's rows: Megatron-Core name <-> Hugging Face name, and the tensors that are carried past both."""

from __future__ import annotations

import dataclasses

from exaone_bridge.models.ernie45.config import Ernie45ModelConfig
from exaone_bridge.schema.param_mapping import (
    HFTensor,
    ParamMapping,
    embeddings,
    experts,
    gqa,
    pre_norm,
    router,
    shared_experts,
    swiglu,
)

__all__ = ["PASSTHROUGH", "ernie45_mappings", "passthrough_tensors", "without_passthrough"]

# Next-token prediction, which the 21B ships and Transformers ignores (`_keys_to_ignore_on_load_unexpected`).
PASSTHROUGH = r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.\d+\..+"


def ernie45_mappings(model_config: Ernie45ModelConfig) -> tuple[ParamMapping, ...]:
    """Every parameter of an ERNIE 4.5 model: pre-norm, dense and mixture-of-experts layers as the schedule says."""
    layers, moe = model_config.layers, model_config.moe_layers
    dense = tuple(layer for layer in layers if layer not in moe)
    mappings = (
        *embeddings(tied=model_config.tied, bias=model_config.head_bias),
        *pre_norm(layers, moe),
        *gqa(layers, bias=model_config.bias),
        *swiglu(dense, bias=model_config.bias),
        *router(moe, weight="gate.weight", selection_bias="moe_statics.e_score_correction_bias"),
        *experts(moe, model_config.num_experts),
        *(
            shared_experts(moe, bias=model_config.bias)
            if model_config.moe and model_config.moe.num_shared_experts
            else ()
        ),
    )
    return tuple(mapping for mapping in mappings if mapping.layers or "*" not in mapping.megatron)


def without_passthrough(model_config: Ernie45ModelConfig) -> Ernie45ModelConfig:
    """The facts of the same model without next-token-prediction layers beside it."""
    return dataclasses.replace(model_config, mtp=None)


def passthrough_tensors(model_config: Ernie45ModelConfig) -> tuple[HFTensor, ...]:
    """What a random checkpoint with next-token-prediction layers has of them: a dense block and its three inputs."""
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
        "mtp_linear_proj.*.weight": "HH",
    }
    return tuple(
        HFTensor(f"model.{name}", axes).numbered(layer)
        for layer in range(0 if model_config.mtp is None else model_config.mtp.num_layers)
        for name, axes in shapes.items()
    )
