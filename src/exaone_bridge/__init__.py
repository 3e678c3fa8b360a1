"""EXAONE and ERNIE in Megatron-Core: a Megatron-Bridge plugin.

`import exaone_bridge` imports neither torch nor Megatron. It leaves two notes with Python's import system:
Megatron-Bridge is made importable where Transformer Engine is missing, and our bridges are registered as soon as it has
been imported (at once, if it has been already).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exaone_bridge.bridge.registration import register, register_when_imported, supported
from exaone_bridge.patches.import_guard import transformer_engine_placeholder
from exaone_bridge.verification import verify

if TYPE_CHECKING:
    from exaone_bridge.bridge.ernie45 import Ernie45Bridge
    from exaone_bridge.bridge.exaone4 import Exaone4Bridge
    from exaone_bridge.bridge.exaone45 import Exaone45Bridge
    from exaone_bridge.runtime.cpu import cpu_runtime

__version__ = "0.1.0"
__all__ = [
    "Ernie45Bridge",
    "Exaone4Bridge",
    "Exaone45Bridge",
    "__version__",
    "cpu_runtime",
    "register",
    "supported",
    "verify",
]


def __getattr__(name: str) -> Any:  # these import torch
    if name == "cpu_runtime":
        from exaone_bridge.runtime.cpu import cpu_runtime

        return cpu_runtime
    if name == "Exaone4Bridge":
        from exaone_bridge.bridge.exaone4 import Exaone4Bridge

        return Exaone4Bridge
    if name == "Exaone45Bridge":
        from exaone_bridge.bridge.exaone45 import Exaone45Bridge

        return Exaone45Bridge
    if name == "Ernie45Bridge":
        from exaone_bridge.bridge.ernie45 import Ernie45Bridge

        return Ernie45Bridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


transformer_engine_placeholder.apply()
register_when_imported()
