"""EXAONE 4.5 for Megatron-Bridge."""

from __future__ import annotations

from typing import Any

from megatron.core.utils import get_model_config

from exaone_bridge.bridge.exact_bridge import ExactBridge
from exaone_bridge.models.exaone45 import EXAONE45, EXAONE45_WITH_MTP
from exaone_bridge.models.exaone45.config import ARCHITECTURE, MODEL_TYPE
from exaone_bridge.models.exaone45.provider import (
    Exaone45ModelProvider,
    exaone45_provider,
    model_config_of,
)

__all__ = ["Exaone45Bridge"]


class Exaone45Bridge(ExactBridge):
    """EXAONE 4.5 (33B, images and videos): Hugging Face <-> Megatron-Core, both ways.

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
    model_config_of = staticmethod(model_config_of)

    def build_conversion_tasks(
        self, hf_pretrained: Any, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent's, for a model with or without its multi-token prediction."""
        self._choose_mappings(megatron_model)
        return super().build_conversion_tasks(hf_pretrained, megatron_model, *args, **kwargs)

    def load_weights_hf_to_megatron(
        self, hf_pretrained: Any, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent's, for a model with or without its multi-token prediction."""
        self._choose_mappings(megatron_model)
        return super().load_weights_hf_to_megatron(hf_pretrained, megatron_model, *args, **kwargs)

    def stream_weights_megatron_to_hf(
        self, megatron_model: Any, hf_pretrained: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent's, for a model with or without its multi-token prediction."""
        self._choose_mappings(megatron_model)
        return super().stream_weights_megatron_to_hf(megatron_model, hf_pretrained, *args, **kwargs)

    def _choose_mappings(self, megatron_model: Any) -> None:
        """Multi-token prediction has rows where it was built, and else travels beside the model."""
        chunks = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        if get_model_config(chunks[0]).mtp_num_layers:
            self.FAMILY = EXAONE45_WITH_MTP  # type: ignore[misc]
        else:
            self.FAMILY = EXAONE45  # type: ignore[misc]
