"""A model in a few words, for reports and cards. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.schema.layer_schedule import mlp_pattern, pattern

__all__ = ["model_summary"]


def model_summary(source: HFCheckpoint) -> dict[str, Any]:
    """Family, size and shape."""
    model_config = source.model_config
    moe = tuple(getattr(model_config, "moe", ()))
    summary: dict[str, Any] = {
        "family": source.family.name,
        "architecture": source.config["architectures"][0],
        "parameters": source.num_elements,
        "bytes": source.nbytes,
        "dtype": model_config.dtype,
        "num_layers": model_config.num_layers,
        "layers": pattern(model_config.windows),
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
    if (vision := getattr(model_config, "vision", None)) is not None:
        summary["vision"] = dataclasses.asdict(vision) | {"head_dim": vision.head_dim}
    if depth := getattr(model_config, "mtp_depth", 0):
        summary["mtp"] = {"depth": depth, "layers": model_config.mtp_layers}
    if any(moe):
        summary |= {
            "feed_forward": mlp_pattern(moe),
            "experts": model_config.num_experts,
            "experts_per_token": model_config.topk,
            "shared_experts": model_config.num_shared_experts,
            "expert_ffn_size": model_config.expert_ffn_size,
        }
    return summary
