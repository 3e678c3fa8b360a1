"""ERNIE 4.5's rows: Megatron-Core name <-> Hugging Face name, and the tensors that are carried past both."""

from __future__ import annotations

import dataclasses

from exaone_bridge.models.ernie45.config import Ernie45Facts
from exaone_bridge.schema.param_mapping import (
    HFTensor,
    Row,
    embeddings,
    experts,
    gqa,
    pre_norm,
    router,
    shared_experts,
    swiglu,
)

__all__ = ["CARRIED", "carried_tensors", "ernie45_rows", "without_carried"]

# Next-token prediction, which the 21B ships and Transformers ignores (`_keys_to_ignore_on_load_unexpected`).
CARRIED = r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.\d+\..+"


def ernie45_rows(facts: Ernie45Facts) -> tuple[Row, ...]:
    """Every parameter of an ERNIE 4.5 model: pre-norm, dense and mixture-of-experts layers as the schedule says."""
    layers, moe = facts.layers, facts.moe_layers
    dense = tuple(layer for layer in layers if layer not in moe)
    rows = (
        *embeddings(tied=facts.tied, bias=facts.head_bias),
        *pre_norm(layers, moe),
        *gqa(layers, bias=facts.bias),
        *swiglu(dense, bias=facts.bias),
        *router(moe, weight="gate.weight", selection_bias="moe_statics.e_score_correction_bias"),
        *experts(moe, facts.num_experts),
        *(shared_experts(moe, bias=facts.bias) if facts.num_shared_experts else ()),
    )
    return tuple(row for row in rows if row.layers or "*" not in row.megatron)


def without_carried(facts: Ernie45Facts) -> Ernie45Facts:
    """The facts of the same model without next-token-prediction layers beside it."""
    return dataclasses.replace(facts, mtp_layers=0)


def carried_tensors(facts: Ernie45Facts) -> tuple[HFTensor, ...]:
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
        for layer in range(facts.mtp_layers)
        for name, axes in shapes.items()
    )
