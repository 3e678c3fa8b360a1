"""ERNIE 4.5 for Megatron-Bridge."""

from __future__ import annotations

from typing import Any

from exaone_bridge.families.ernie45 import ERNIE45
from exaone_bridge.families.ernie45.config import MODEL_TYPES, MOE, first_pool, read_config, write_config
from exaone_bridge.families.ernie45.provider import Ernie45ModelProvider, ernie45_provider, facts_of
from exaone_bridge.host.bridge_base import ExactBridge, config_mapping

__all__ = ["Ernie45Bridge"]


class Ernie45Bridge(ExactBridge):
    """ERNIE 4.5 (0.3B dense; 21B and 300B mixtures of experts): Hugging Face <-> Megatron-Core, both ways.

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

    @staticmethod
    def _get_num_experts(hf_config: Any) -> int:
        """Routed experts, of a number, [N] or [N, N]."""
        return int(first_pool(config_mapping(hf_config), "moe_num_experts"))

    def provider_bridge(self, hf_pretrained: Any) -> Ernie45ModelProvider:
        """The provider of a Hugging Face model (anything with `.config`).

        Raises:
            UnsupportedConfig: the configuration is not modelled.
        """
        config = config_mapping(hf_pretrained.config)
        return ernie45_provider(read_config(config), config)

    @classmethod
    def megatron_to_hf_config(cls, provider: Ernie45ModelProvider) -> dict[str, Any]:
        """`config.json` of the model that this provider builds, as `save_pretrained` writes it, less the version."""
        return write_config(facts_of(provider), provider.hf_config)
