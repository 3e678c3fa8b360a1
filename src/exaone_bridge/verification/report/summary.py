"""Summarises a model for reports and cards. No torch is imported."""

from __future__ import annotations

import dataclasses

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.layer_schedule import attention_pattern, mlp_pattern

__all__ = ["model_summary"]


def model_summary(checkpoint: HFCheckpoint) -> JSONObject:
    """Return family, size (elements, bytes) and shape of a checkpoint's model."""
    config = checkpoint.model.config
    summary: JSONObject = {
        "family": checkpoint.family.name,
        "architecture": checkpoint.config["architectures"][0],
        "parameters": checkpoint.num_elements,
        "bytes": checkpoint.nbytes,
        "dtype": config.dtype,
        "num_layers": config.num_layers,
        "layers": attention_pattern(config.windows),
        "rope": "".join("R" if applied else "-" for applied in config.rope),
        "window": next((window for window in config.windows if window), None),
        "hidden_size": config.hidden_size,
        "ffn_size": config.ffn_size,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied": config.tied,
    }
    if (vision := config.vision) is not None:
        summary["vision"] = dataclasses.asdict(vision) | {"head_dim": vision.head_dim}
    if (mtp := config.mtp) is not None:
        summary["mtp"] = {"depth": mtp.depth, "layers": mtp.num_layers}
    if (moe := config.moe) is not None:
        summary |= {
            "mlp_layers": mlp_pattern(moe.layer_mask),
            "experts": moe.num_experts,
            "experts_per_token": moe.topk,
            "shared_experts": moe.num_shared_experts,
            "expert_ffn_size": moe.expert_ffn_size,
        }
    return summary
