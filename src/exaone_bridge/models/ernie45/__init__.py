"""ERNIE 4.5: pre-norm, interleaved RoPE, dense or mixture of experts with a softmax router. No torch here."""

from __future__ import annotations

from exaone_bridge.models.ernie45.config import (
    ARCHITECTURES,
    LISTED,
    MODEL_TYPES,
    MOE,
    read_config,
    write_config,
)
from exaone_bridge.models.ernie45.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, TINY
from exaone_bridge.models.ernie45.weights import (
    CARRIED,
    carried_tensors,
    ernie45_rows,
    without_carried,
)
from exaone_bridge.schema.model_family import Family

__all__ = ["ERNIE45"]

ERNIE45 = Family(
    name="ernie45",
    architectures=ARCHITECTURES,
    read_config=read_config,
    write_config=write_config,
    rows=ernie45_rows,
    tiny=TINY,
    special_tokens=SPECIAL_TOKENS,
    chat_template=CHAT_TEMPLATE,
    carried=CARRIED,
    carried_tensors=carried_tensors,
    without_carried=without_carried,
    listed_fields={MODEL_TYPES[MOE]: LISTED},
)
