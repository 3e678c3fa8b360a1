"""ERNIE 4.5 for Megatron-Bridge."""

from __future__ import annotations

from exaone_bridge.bridge.exact_bridge import ExactBridge
from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.models.ernie45.config import MODEL_TYPES, MOE
from exaone_bridge.models.ernie45.provider import (
    Ernie45ModelProvider,
    ernie45_provider,
)

__all__ = ["Ernie45Bridge"]


class Ernie45Bridge(ExactBridge):
    """Converts ERNIE 4.5 (0.3B dense; 21B and 300B mixture of experts), both ways.

    Example:
        >>> import exaone_bridge
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("baidu/ERNIE-4.5-21B-A3B-PT")
        >>> provider = bridge.to_megatron_provider()
    """

    FAMILY = ERNIE45
    SOURCE_NAME = MOE
    MODEL_TYPE = MODEL_TYPES[MOE]
    PROVIDER_CLASS = Ernie45ModelProvider
    provider_of = staticmethod(ernie45_provider)
