"""ERNIE 4.5's model provider -> model config. No torch."""

from __future__ import annotations

from typing import Any

from exaone_bridge.models.ernie45.config import Ernie45ModelConfig, Ernie45MoEConfig
from exaone_bridge.schema.layer_schedule import moe_layer_mask_of
from exaone_bridge.schema.model_config import MTPConfig, model_config_fields

__all__ = ["model_config_of"]


def model_config_of(provider: Any) -> Ernie45ModelConfig:
    """Return the config of the model that this provider builds; inverse of `ernie45_provider`."""
    depth = provider.mtp_layers_passthrough
    return Ernie45ModelConfig(
        **model_config_fields(Ernie45ModelConfig, provider),
        moe=_moe_config_of(provider),
        mtp=MTPConfig(depth=depth) if depth else None,
    )


def _moe_config_of(provider: Any) -> Ernie45MoEConfig | None:
    layer_mask = moe_layer_mask_of(
        provider.moe_layer_freq, provider.num_layers, provider.num_moe_experts
    )
    if not any(layer_mask):
        return None
    shared_size = provider.moe_shared_expert_intermediate_size or 0
    return Ernie45MoEConfig(
        **Ernie45MoEConfig.values_from_provider(provider),
        layer_mask=layer_mask,
        num_shared_experts=shared_size // provider.moe_ffn_hidden_size,
    )
