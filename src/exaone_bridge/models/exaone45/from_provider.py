"""EXAONE 4.5's model provider -> model config. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exaone_bridge.models.exaone4.from_provider import exaone4_config_fields
from exaone_bridge.models.exaone45.config import Exaone45ModelConfig
from exaone_bridge.schema.model_config import MTPConfig, VisionConfig

__all__ = ["model_config_of", "vision_config_of"]


def model_config_of(provider: Any) -> Exaone45ModelConfig:
    """Return the config of the model that this provider builds; inverse of `exaone45_provider`."""
    depth = provider.mtp_num_layers or provider.mtp_depth
    mtp = MTPConfig(**MTPConfig.values_from_provider(provider) | {"depth": depth})
    return Exaone45ModelConfig(
        **exaone4_config_fields(Exaone45ModelConfig, provider),
        vision=vision_config_of(provider.vision),
        mtp=mtp if depth else None,
    )


def vision_config_of(fields: Mapping[str, Any]) -> VisionConfig:
    """Return the vision encoder's config from the provider's field `vision`."""
    return VisionConfig(**{**fields, "full_attention": tuple(fields["full_attention"])})
