"""Configurations whose fields are lists of one value for each pool of experts, which Transformers 5 refuses to read.

`Ernie4_5_MoeConfig` (transformers 5.12, `configuration_ernie4_5_moe.py`) types these fields as whole numbers and checks
them strictly, so `AutoConfig` dies on `"moe_num_experts": [64, 64]`. The text model has one pool: the first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from exaone_bridge.schema.model_family import ModelFamily

__all__ = ["tolerate_listed_fields"]


def tolerate_listed_fields(families: Iterable[ModelFamily]) -> None:
    """Let Transformers' config classes take the first value of a listed field. Doing it again is harmless."""
    from transformers import CONFIG_MAPPING

    for family in families:
        for model_type, fields in family.listed_fields.items():
            _wrap(CONFIG_MAPPING[model_type], frozenset(fields))


def _wrap(config_class: Any, fields: frozenset[str]) -> None:
    inner = config_class.from_dict.__func__
    if hasattr(inner, "_exaone_bridge"):
        return

    @functools.wraps(inner)
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        plain = {
            key: value[0]
            if key in fields and isinstance(value, list) and len(value) in (1, 2)
            else value
            for key, value in config_dict.items()
        }
        return inner(cls, plain, **kwargs)

    from_dict._exaone_bridge = True  # type: ignore[attr-defined]
    config_class.from_dict = classmethod(from_dict)
