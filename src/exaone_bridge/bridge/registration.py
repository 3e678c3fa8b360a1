"""Claims architectures in Megatron-Bridge's dispatch, by class and by name, and proves the claim.

Megatron-Bridge registers bridges of its own for the same architectures, some under the name and some under the class,
and looks up by whichever it has (`megatron/bridge/models/conversion/auto_bridge.py`, `_causal_lm_architecture`).
A later registration of the same key wins; so ours comes after its own have run, under both keys.

What registering needs is imported when it registers: `import exaone_bridge` only leaves a note.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from exaone_bridge.errors import RegistrationError
from exaone_bridge.patches.import_hook import after_import

if TYPE_CHECKING:
    from exaone_bridge.bridge.exact_bridge import ExactBridge

__all__ = ["register", "register_when_imported", "supported"]

_HOST = "megatron.bridge"


def _bridge_classes() -> dict[str, type[ExactBridge]]:
    from exaone_bridge.bridge.ernie45 import Ernie45Bridge
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge
    from exaone_bridge.bridge.exaone45 import Exaone45Bridge

    bridges = (Exaone4Bridge, Exaone45Bridge, Ernie45Bridge)
    return {name: bridge for bridge in bridges for name in bridge.FAMILY.architectures}


def _keys(architecture: str) -> tuple[object, ...]:
    """What the host may look the architecture up by: its name, and Transformers' class where there is one."""
    import transformers

    by_class = getattr(transformers, architecture, None)
    return (architecture,) if by_class is None else (architecture, by_class)


def register() -> None:
    """Claim every architecture of `FAMILIES`. Imports Megatron-Bridge and torch; doing it again is harmless.

    Raises:
        RegistrationError: the host still looks up another class.
    """
    from megatron.bridge.models.conversion.model_bridge import register_bridge_implementation
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
    from megatron.core.models.gpt import GPTModel

    from exaone_bridge.patches.table import PATCHES

    register_allowed_target_prefix(
        "exaone_bridge."
    )  # run_config.yaml names our providers and spec functions
    classes = _bridge_classes()
    for patch in PATCHES:
        patch.apply()
    for architecture, bridge in classes.items():
        for key in _keys(architecture):
            register_bridge_implementation(source=key, target=GPTModel, bridge_class=bridge)
    _prove(classes)


def _prove(classes: dict[str, type[ExactBridge]]) -> None:
    from megatron.bridge.models.conversion.model_bridge import get_model_bridge

    for architecture, bridge in classes.items():
        for key in _keys(architecture):
            found = type(get_model_bridge(key))
            if found is not bridge:
                raise RegistrationError(
                    f"Megatron-Bridge: {key!r} is looked up as {found.__module__}.{found.__qualname__}, and must be "
                    f"{bridge.__module__}.{bridge.__qualname__}; import exaone_bridge after what registered the other."
                )


def supported() -> dict[str, type[ExactBridge]]:
    """Architecture -> the bridge class that AutoBridge uses for it, looked up and proved now.

    Imports Megatron-Bridge, and registers if that has not happened yet.

    Raises:
        RegistrationError: something else has claimed an architecture since.
    """
    importlib.import_module(_HOST)  # registers through the hook, unless it was there first
    classes = _bridge_classes()
    _prove(classes)
    return classes


def register_when_imported() -> None:
    """Register now if Megatron-Bridge is imported already, else at the end of its import."""
    after_import(_HOST, register)
