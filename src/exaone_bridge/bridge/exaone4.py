"""EXAONE 4.0 for Megatron-Bridge."""

from __future__ import annotations

import dataclasses
from typing import Any

from exaone_bridge.bridge.exact_bridge import ExactBridge
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone4.config import ARCHITECTURE, MODEL_TYPE
from exaone_bridge.models.exaone4.provider import (
    Exaone4ModelProvider,
    exaone4_provider,
)
from exaone_bridge.modules.provider import ExactGPTModelProvider

__all__ = ["Exaone4Bridge"]

_SPEC_MODULE = "megatron.bridge.models.exaone.exaone4.exaone4_provider"
# What every EXAONE 4.0 has.
_FIXED = (
    "normalization",
    "gated_linear_unit",
    "add_bias_linear",
    "qk_layernorm",
    "position_embedding_type",
)
# Fields that both providers have, of another content.
_OWN = ("transformer_layer_spec", "hf_config")


class Exaone4Bridge(ExactBridge):
    """Converts EXAONE 4.0 (1.2B, 32B hybrid), both ways.

    Example:
        >>> import exaone_bridge
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("LGAI-EXAONE/EXAONE-4.0-1.2B")
        >>> provider = bridge.to_megatron_provider()
    """

    FAMILY = EXAONE4
    SOURCE_NAME = ARCHITECTURE
    MODEL_TYPE = MODEL_TYPE
    PROVIDER_CLASS = Exaone4ModelProvider
    provider_of = staticmethod(exaone4_provider)

    @classmethod
    def convert_provider(cls, provider: Any) -> ExactGPTModelProvider:
        """Make our provider of that of Megatron-Bridge's bridge for EXAONE 4.0.

        Both build the same model, but Megatron-Bridge's (`models/exaone/exaone4`, 0.6.2) never has
        sliding windows.

        Raises:
            UnsupportedConfig: it is another model's provider, or was changed to another model.
        """
        ours = {each.name: each for each in dataclasses.fields(Exaone4ModelProvider)}
        spec = getattr(provider, "transformer_layer_spec", None)
        if getattr(spec, "__module__", "") != _SPEC_MODULE or any(
            getattr(provider, name) != ours[name].default for name in _FIXED
        ):
            return super().convert_provider(provider)
        fields = {
            name: getattr(provider, name)
            for name, each in ours.items()
            if each.init and name not in _OWN and hasattr(provider, name)
        }
        return Exaone4ModelProvider(**fields)
