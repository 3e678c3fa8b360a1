"""The families. A new one is a folder and a line here; nothing else has to know it. No torch."""

from __future__ import annotations

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.ernie45 import ERNIE45
from exaone_bridge.models.exaone4 import EXAONE4
from exaone_bridge.models.exaone45 import EXAONE45
from exaone_bridge.schema.model_family import ModelFamily

__all__ = ["FAMILIES", "family_of", "is_supported"]

FAMILIES: tuple[ModelFamily, ...] = (EXAONE4, ERNIE45, EXAONE45)


def family_of(architectures: object, *, where: str) -> ModelFamily:
    """The family that claims the first of these architectures.

    Args:
        architectures: what `config.json` lists.
        where: the file, for the message.

    Raises:
        UnsupportedConfig: nobody claims it; the message lists those we do.
    """
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    for family in FAMILIES:
        if first in family.architectures:
            return family
    known = tuple(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedConfig("architectures", got=architectures, known=known, where=where)


def is_supported(hf_config: object) -> bool:
    """Whether an architecture of this Transformers config belongs to one of FAMILIES."""
    names = set(getattr(hf_config, "architectures", None) or ())
    return any(names & set(family.architectures) for family in FAMILIES)
