"""Megatron-Bridge importable where Transformer Engine is not installed.

`megatron/bridge/peft/lora_layers.py` (0.6.2) is the one module of it that imports `transformer_engine.pytorch`
unconditionally; it needs the names only for annotations and isinstance checks. A placeholder stands in sys.modules
while that module executes, and neither before nor after, so that everything else still sees that it is absent.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

from exaone_bridge.patches.import_hook import around_import

__all__ = ["guard_imports"]

_GUARDED = "megatron.bridge.peft.lora_layers"


class _Placeholder(ModuleType):
    """A module whose every public attribute is a class of its own that nothing is an instance of."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value: object = _Placeholder(name) if name == "ops" else type(name, (), {})
        setattr(self, name, value)
        return value


@contextlib.contextmanager
def _transformer_engine_placeholder() -> Iterator[None]:
    from importlib.util import (
        find_spec,  # when it is needed: it delays a command that needs nothing else
    )

    names = ("transformer_engine", "transformer_engine.pytorch")
    # What is loaded already need not have a spec, and find_spec then raises.
    if names[0] in sys.modules or find_spec(names[0]) is not None:
        yield  # where it is present nothing is touched
        return
    package, pytorch = (_Placeholder(name) for name in names)
    setattr(package, "pytorch", pytorch)  # noqa: B010  a module's attributes are not declared
    sys.modules.update(zip(names, (package, pytorch), strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def guard_imports() -> None:
    """Have the guard in place; it acts when, and only when, the guarded module is imported."""
    around_import(_GUARDED, _transformer_engine_placeholder)
