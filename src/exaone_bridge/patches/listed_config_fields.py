"""Lets Transformers read ERNIE 4.5 configs with fields that list a value for each expert pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exaone_bridge.models.ernie45.config import LISTED
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.json_types import JSONObject

__all__ = ["from_dict"]


@patch(
    "transformers.models.ernie4_5_moe.configuration_ernie4_5_moe:Ernie4_5_MoeConfig.from_dict",
    version="Transformers 5.12.1",
    reason='The config class requires integers, so AutoConfig rejects `"moe_num_experts": [64, 64]`'
    " of multimodal checkpoints; the text model has one expert pool, the first.",
)
def from_dict(
    original: Callable[..., Any], cls: type, config_dict: JSONObject, **kwargs: object
) -> Any:
    """Read the config with the first value of each listed field."""
    plain = {
        key: value[0]
        if key in LISTED and isinstance(value, list) and len(value) in (1, 2)
        else value
        for key, value in config_dict.items()
    }
    return original(cls, plain, **kwargs)
