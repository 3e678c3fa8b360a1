"""Registers our model bridges in Megatron-Bridge, and verifies the registration.

Megatron-Bridge has bridges of its own for some of the same architectures, some registered under
the architecture's name and some under Transformers' class, and looks up by whichever it has
(`megatron/bridge/models/conversion/auto_bridge.py`, `_causal_lm_architecture`, 0.6.2). The last
registration under a key counts; so our bridges are registered after its own, and replace it under
both keys.

Imports no torch until it registers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from exaone_bridge.errors import RegistrationError
from exaone_bridge.patches.environment import let_tokenizers_notice_forks, provide_lock_folder
from exaone_bridge.patches.import_hook import after_import, import_before

if TYPE_CHECKING:
    from exaone_bridge.bridge.exact_bridge import ExactBridge

__all__ = ["register", "register_when_imported", "supported"]

_MEGATRON_BRIDGE = "megatron.bridge"
_SETS_TOKENIZERS = "megatron.bridge.data.datasets.gpt_sft"  # a variable of theirs
_AFTER_IT = (
    r"exaone_bridge\.(modules\.\w+|bridge\.(?!registration$)\w+|models\.\w+\."
    r"(collate|head_model|layer_spec|model|provider|router|vision_encoder))"
)


def _bridge_classes() -> dict[str, type[ExactBridge]]:
    from exaone_bridge.bridge.ernie45 import Ernie45Bridge
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge
    from exaone_bridge.bridge.exaone45 import Exaone45Bridge
    from exaone_bridge.bridge.exaone_moe import ExaoneMoeBridge

    bridges = (Exaone4Bridge, Exaone45Bridge, ExaoneMoeBridge, Ernie45Bridge)
    return {name: bridge for bridge in bridges for name in bridge.FAMILY.architectures}


def _keys(architecture: str) -> tuple[object, ...]:
    """Return the keys of an architecture: its name, and Transformers' class where there is one."""
    import transformers

    by_class = getattr(transformers, architecture, None)
    return (architecture,) if by_class is None else (architecture, by_class)


def register() -> None:
    """Register the bridge of every supported architecture, and apply all patches.

    Imports Megatron-Bridge and torch. Registering again changes nothing. The look-up by class falls
    back to the class's name, so the key of the class is removed again: AutoBridge lists every key.

    Raises:
        RegistrationError: Megatron-Bridge still finds another class.
    """
    from megatron.bridge.models.conversion.model_bridge import (
        get_model_bridge,
        register_bridge_implementation,
    )
    from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
    from megatron.core.models.gpt import GPTModel

    from exaone_bridge.patches.table import PATCHES
    from exaone_bridge.patches.tested_versions import warn_of_newer_versions

    warn_of_newer_versions()
    provide_lock_folder()
    after_import(_SETS_TOKENIZERS, let_tokenizers_notice_forks)
    # run_config.yaml of a checkpoint names our providers and layer specs.
    register_allowed_target_prefix("exaone_bridge.")
    for patch in PATCHES:
        patch.apply()
    classes = _bridge_classes()
    for architecture, bridge in classes.items():
        for key in _keys(architecture):
            register_bridge_implementation(source=key, target=GPTModel, bridge_class=bridge)
            if not isinstance(key, str):
                get_model_bridge._exact_types.pop(key)
    _verify(classes)


def _verify(classes: dict[str, type[ExactBridge]]) -> None:
    from megatron.bridge.models.conversion.model_bridge import get_model_bridge

    for architecture, bridge in classes.items():
        for key in _keys(architecture):
            found = type(get_model_bridge(key))
            if found is not bridge:
                raise RegistrationError(
                    f"Megatron-Bridge: {key!r} is looked up as "
                    f"{found.__module__}.{found.__qualname__}, and must be "
                    f"{bridge.__module__}.{bridge.__qualname__}; "
                    "import exaone_bridge after what registered the other."
                )


def supported() -> dict[str, type[ExactBridge]]:
    """Look up the supported architectures in Megatron-Bridge, which is imported if necessary.

    Returns:
        Architecture -> the bridge class that AutoBridge uses for it.

    Raises:
        RegistrationError: another class has been registered for an architecture since.
    """
    importlib.import_module(_MEGATRON_BRIDGE)  # the import hook registers
    classes = _bridge_classes()
    _verify(classes)
    return classes


def register_when_imported() -> None:
    """Register now if Megatron-Bridge is imported already, else at the end of its import.

    Modules of ours that import it themselves come after it: the registration imports them, and must
    not find one half imported.
    """
    after_import(_MEGATRON_BRIDGE, register)
    import_before(_MEGATRON_BRIDGE, _AFTER_IT)
