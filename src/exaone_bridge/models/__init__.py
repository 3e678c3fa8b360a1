"""The registry of model families. No torch."""

from __future__ import annotations

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone45 import EXAONE45
from exaone_bridge.models.exaone_moe import EXAONE_MOE
from exaone_bridge.schema.model_family import ModelFamily

__all__ = ["FAMILIES", "family_of", "is_supported"]

FAMILIES: tuple[ModelFamily, ...] = (EXAONE4, ERNIE45, EXAONE45, EXAONE_MOE)


def family_of(architectures: object, *, where: str) -> ModelFamily:
    """Return the family that supports the first of these architectures.

    Args:
        architectures: `architectures` of config.json.
        where: the file, for the message.

    Raises:
        UnsupportedConfig: no family supports it; the message lists the supported ones.
    """
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if first in family.architectures:
            return family
    known = tuple(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedConfig("architectures", got=architectures, known=known, where=where)


def is_supported(hf_config: object) -> bool:
    """Return whether a family supports an architecture of this Transformers config."""
    names = set(getattr(hf_config, "architectures", None) or ())
    return any(names & set(family.architectures) for family in FAMILIES)
