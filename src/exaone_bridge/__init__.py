"""EXAONE and ERNIE models for Megatron-Bridge: exact conversion Hugging Face <-> Megatron-Core.

    >>> import exaone_bridge                       # registers the models
    >>> from megatron.bridge import AutoBridge
    >>> bridge = AutoBridge.from_hf_pretrained("LGAI-EXAONE/EXAONE-4.0-1.2B")
    >>> provider = bridge.to_megatron_provider()

The import itself is fast and loads neither torch nor Megatron. It installs import hooks: they
register the model bridges and apply the patches (docs/dev/patches.md) when Megatron-Bridge is
imported, at once if it has been, and make it importable where Transformer Engine is missing. It
also hides messages about missing GPU packages; EXAONE_BRIDGE_SHOW_WARNINGS=1 shows them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exaone_bridge.bridge.registration import register, register_when_imported, supported
from exaone_bridge.patches.import_guard import transformer_engine_placeholder
from exaone_bridge.patches.known_messages import hide_known_messages
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification import verify

if TYPE_CHECKING:
    from exaone_bridge.bridge.ernie45 import Ernie45Bridge
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge
    from exaone_bridge.bridge.exaone45 import Exaone45Bridge
    from exaone_bridge.bridge.exaone_moe import ExaoneMoeBridge
    from exaone_bridge.convert.to_hf import export_checkpoint
    from exaone_bridge.convert.to_megatron import import_checkpoint
    from exaone_bridge.runtime.cpu import cpu_runtime

__version__ = "0.1.0"
__all__ = [
    "Ernie45Bridge",
    "Exaone4Bridge",
    "Exaone45Bridge",
    "ExaoneMoeBridge",
    "Layout",
    "__version__",
    "cpu_runtime",
    "export_checkpoint",
    "import_checkpoint",
    "register",
    "supported",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the public names that need torch when they are first used."""
    if name == "cpu_runtime":
        from exaone_bridge.runtime.cpu import cpu_runtime

        return cpu_runtime
    if name == "import_checkpoint":
        from exaone_bridge.convert.to_megatron import import_checkpoint

        return import_checkpoint
    if name == "export_checkpoint":
        from exaone_bridge.convert.to_hf import export_checkpoint

        return export_checkpoint
    if name == "Exaone4Bridge":
        from exaone_bridge.bridge.exaone4 import Exaone4Bridge

        return Exaone4Bridge
    if name == "Exaone45Bridge":
        from exaone_bridge.bridge.exaone45 import Exaone45Bridge

        return Exaone45Bridge
    if name == "ExaoneMoeBridge":
        from exaone_bridge.bridge.exaone_moe import ExaoneMoeBridge

        return ExaoneMoeBridge
    if name == "Ernie45Bridge":
        from exaone_bridge.bridge.ernie45 import Ernie45Bridge

        return Ernie45Bridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


hide_known_messages()
transformer_engine_placeholder.apply()
register_when_imported()
