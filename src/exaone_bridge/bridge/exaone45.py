"""EXAONE 4.5 for Megatron-Bridge."""

from __future__ import annotations

from exaone_bridge.bridge.exact_bridge import ExactBridge
from exaone_bridge.models.exaone45 import EXAONE45
from exaone_bridge.models.exaone45.config import ARCHITECTURE, MODEL_TYPE
from exaone_bridge.models.exaone45.provider import (
    Exaone45ModelProvider,
    exaone45_provider,
)

__all__ = ["Exaone45Bridge"]


class Exaone45Bridge(ExactBridge):
    """Converts EXAONE 4.5 (33B, images and videos), both ways.

    Multi-token prediction has parameter mappings if the Megatron-Core model builds it
    (`mtp_num_layers`); else its tensors are passthrough tensors.

    Example:
        >>> import exaone_bridge
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("LGAI-EXAONE/EXAONE-4.5-33B")
        >>> provider = bridge.to_megatron_provider()
    """

    FAMILY = EXAONE45
    SOURCE_NAME = ARCHITECTURE
    MODEL_TYPE = MODEL_TYPE
    PROVIDER_CLASS = Exaone45ModelProvider
    provider_of = staticmethod(exaone45_provider)
