"""EXAONE 4.0: post-norm, QK norm, hybrid attention without RoPE on full-attention layers."""

from __future__ import annotations

from exaone_bridge.models.exaone4.config import ARCHITECTURE, read_hf_config, write_hf_config
from exaone_bridge.models.exaone4.from_provider import model_config_of
from exaone_bridge.models.exaone4.head_config import HEADS
from exaone_bridge.models.exaone4.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY
from exaone_bridge.models.exaone4.weights import exaone4_mappings
from exaone_bridge.schema.model_family import ModelFamily, TinyFiles

__all__ = ["EXAONE4"]

EXAONE4 = ModelFamily(
    name="exaone4",
    architectures=(ARCHITECTURE, *HEADS),
    read_hf_config=read_hf_config,
    write_hf_config=write_hf_config,
    provider_class="exaone_bridge.models.exaone4.provider.Exaone4ModelProvider",
    model_config_of=model_config_of,
    mappings=exaone4_mappings,
    tiny=TINY,
    tiny_files=TinyFiles(special_tokens=SPECIAL_TOKENS, chat_template=CHAT_TEMPLATE),
)
