"""EXAONE and ERNIE in Megatron-Core: a Megatron-Bridge plugin.

`import exaone_bridge` imports neither torch nor Megatron. It leaves two notes with Python's import system:
Megatron-Bridge is made importable where Transformer Engine is missing, and our bridges are registered as soon as it has
been imported (at once, if it has been already).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from exaone_bridge.host.import_guard import guard_imports
from exaone_bridge.host.registration import register, register_when_imported, supported

if TYPE_CHECKING:
    from exaone_bridge.host.cpu_runtime import cpu_runtime
    from exaone_bridge.verify import verify_model as verify

__version__ = "0.1.0"
__all__ = ["__version__", "cpu_runtime", "register", "supported", "verify"]

_LAZY = {"cpu_runtime": "exaone_bridge.host.cpu_runtime"}


def __getattr__(name: str) -> Any:
    if name == "verify":  # a room that can be called
        return importlib.import_module("exaone_bridge.verify")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


guard_imports()
register_when_imported()
