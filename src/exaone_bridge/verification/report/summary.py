"""A model in a few words, for reports and cards. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from exaone_bridge.checkpoint.hf.source import HFSource
from exaone_bridge.schema.layer_schedule import mlp_pattern, pattern

__all__ = ["model_summary"]


def model_summary(source: HFSource) -> dict[str, Any]:
    """Family, size and shape."""
    facts = source.facts
    moe = tuple(getattr(facts, "moe", ()))
    summary: dict[str, Any] = {
        "family": source.family.name,
        "architecture": source.config["architectures"][0],
        "parameters": source.parameters,
        "bytes": source.nbytes,
        "dtype": facts.dtype,
        "num_layers": facts.num_layers,
        "layers": pattern(facts.windows),
        "rope": "".join("R" if has else "-" for has in facts.rope),
        "window": next((window for window in facts.windows if window), None),
        "hidden_size": facts.hidden_size,
        "ffn_size": facts.ffn_size,
        "num_heads": facts.num_heads,
        "num_kv_heads": facts.num_kv_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab_size,
        "tied": facts.tied,
    }
    if (vision := getattr(facts, "vision", None)) is not None:
        summary["vision"] = dataclasses.asdict(vision) | {"head_dim": vision.head_dim}
    if depth := getattr(facts, "mtp_depth", 0):
        summary["mtp"] = {"depth": depth, "layers": facts.mtp_layers}
    if any(moe):
        summary |= {
            "feed_forward": mlp_pattern(moe),
            "experts": facts.num_experts,
            "experts_per_token": facts.topk,
            "shared_experts": facts.num_shared_experts,
            "expert_ffn_size": facts.expert_ffn_size,
        }
    return summary
