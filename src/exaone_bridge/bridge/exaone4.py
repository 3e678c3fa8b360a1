"""EXAONE 4.0 for Megatron-Bridge."""

from __future__ import annotations

from exaone_bridge.bridge.exact_bridge import ExactBridge
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone4.config import ARCHITECTURE, MODEL_TYPE
from exaone_bridge.models.exaone4.provider import (
    Exaone4ModelProvider,
    exaone4_provider,
)

__all__ = ["Exaone4Bridge"]


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
