"""ERNIE 4.5: pre-norm, interleaved RoPE, dense or a mixture of experts with a softmax router."""

from __future__ import annotations

from exaone_bridge.models.ernie45.config import (
    ARCHITECTURES,
    read_hf_config,
    write_hf_config,
)
from exaone_bridge.models.ernie45.from_provider import model_config_of
from exaone_bridge.models.ernie45.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY
from exaone_bridge.models.ernie45.weights import (
    PASSTHROUGH,
    ernie45_mappings,
    passthrough_tensors,
    without_passthrough,
)
from exaone_bridge.schema.model_family import ModelFamily, PassthroughTensors, TinyFiles

__all__ = ["ERNIE45"]

ERNIE45 = ModelFamily(
    name="ernie45",
    architectures=ARCHITECTURES,
    read_hf_config=read_hf_config,
    write_hf_config=write_hf_config,
    provider_class="exaone_bridge.models.ernie45.provider.Ernie45ModelProvider",
    model_config_of=model_config_of,
    mappings=ernie45_mappings,
    tiny=TINY,
    tiny_files=TinyFiles(special_tokens=SPECIAL_TOKENS, chat_template=CHAT_TEMPLATE),
    passthrough=PassthroughTensors(
        pattern=PASSTHROUGH, tensors=passthrough_tensors, without=without_passthrough
    ),
)
