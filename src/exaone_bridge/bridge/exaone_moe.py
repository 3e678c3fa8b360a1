"""EXAONE MoE (K-EXAONE) for Megatron-Bridge."""

from __future__ import annotations

from exaone_bridge.bridge.exact_bridge import ExactBridge
from exaone_bridge.models.exaone_moe import EXAONE_MOE
from exaone_bridge.models.exaone_moe.config import ARCHITECTURES, MODEL_TYPE
from exaone_bridge.models.exaone_moe.provider import (
    ExaoneMoeModelProvider,
    exaone_moe_provider,
)

__all__ = ["ExaoneMoeBridge"]


class ExaoneMoeBridge(ExactBridge):
    """K-EXAONE (236B-A23B, 2.0 750B-A37B): Hugging Face <-> Megatron-Core, both ways.

    Example:
        >>> import exaone_bridge
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("LGAI-EXAONE/K-EXAONE-236B-A23B")
        >>> provider = bridge.to_megatron_provider()
    """

    FAMILY = EXAONE_MOE
    SOURCE_NAME = ARCHITECTURES[0]
    MODEL_TYPE = MODEL_TYPE
    PROVIDER_CLASS = ExaoneMoeModelProvider
    provider_of = staticmethod(exaone_moe_provider)
