"""EXAONE 4.0's model provider -> model config. No torch."""

from __future__ import annotations

from typing import Any

from exaone_bridge.models.exaone4.config import Exaone4ModelConfig, Llama3Rope
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.layer_schedule import rope_of, windows_of_megatron
from exaone_bridge.schema.model_config import HeadConfig, model_config_fields

__all__ = ["exaone4_config_fields", "model_config_of"]


def model_config_of(provider: Any) -> Exaone4ModelConfig:
    """Return the config of the model that this provider builds; inverse of `exaone4_provider`."""
    head = getattr(provider, "head", None)  # checkpoints of earlier versions have no such field
    return Exaone4ModelConfig(
        **exaone4_config_fields(Exaone4ModelConfig, provider),
        head=HeadConfig(**head) if head else None,
    )


def exaone4_config_fields(config_class: type[Exaone4ModelConfig], provider: Any) -> JSONObject:
    """Return the inverse of `exaone4_provider_fields`: the model config's keyword arguments."""
    llama3 = Llama3Rope(**Llama3Rope.values_from_provider(provider))
    return {
        **model_config_fields(config_class, provider),
        "llama3": llama3 if provider.rope_scaling else None,
        "windows": windows_of_megatron(
            provider.window_size, provider.window_attn_skip_freq, provider.num_layers
        ),
        "rope": rope_of(provider.no_rope_freq, provider.num_layers),
    }
