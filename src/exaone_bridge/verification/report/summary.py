"""A model in a few words, for reports and cards. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.schema.layer_schedule import attention_pattern, mlp_pattern

__all__ = ["model_summary"]


def model_summary(source: HFCheckpoint) -> dict[str, Any]:
    """Family, size and shape."""
    model_config = source.model_config
    summary: dict[str, Any] = {
        "family": source.family.name,
        "architecture": source.config["architectures"][0],
        "parameters": source.num_elements,
        "bytes": source.nbytes,
        "dtype": model_config.dtype,
        "num_layers": model_config.num_layers,
        "layers": attention_pattern(model_config.windows),
        "rope": "".join("R" if has else "-" for has in model_config.rope),
        "window": next((window for window in model_config.windows if window), None),
        "hidden_size": model_config.hidden_size,
        "ffn_size": model_config.ffn_size,
        "num_heads": model_config.num_heads,
        "num_kv_heads": model_config.num_kv_heads,
        "head_dim": model_config.head_dim,
        "vocab_size": model_config.vocab_size,
        "tied": model_config.tied,
    }
    if (vision := model_config.vision) is not None:
        summary["vision"] = dataclasses.asdict(vision) | {"head_dim": vision.head_dim}
    if (mtp := model_config.mtp) is not None:
        summary["mtp"] = {"depth": mtp.depth, "layers": mtp.num_layers}
    if (moe := model_config.moe) is not None:
        summary |= {
            "feed_forward": mlp_pattern(moe.layer_mask),
            "experts": moe.num_experts,
            "experts_per_token": moe.topk,
            "shared_experts": moe.num_shared_experts,
            "expert_ffn_size": moe.expert_ffn_size,
        }
    return summary
