"""Makes Megatron-Bridge importable where Transformer Engine is not installed. No torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

from exaone_bridge.patches.patch import patch_import

__all__ = ["transformer_engine_placeholder"]


class _Placeholder(ModuleType):
    """A module whose every public attribute is a class of its own without instances."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        value: object = _Placeholder(name) if name == "ops" else type(name, (), {})
        setattr(self, name, value)
        return value


@patch_import(
    "megatron.bridge.peft.lora_layers",
    version="Megatron-Bridge 0.6.2",
    reason="The module imports transformer_engine.pytorch unconditionally, though it needs the "
    "names only for annotations and isinstance checks; a placeholder is importable while it "
    "executes.",
)
@contextlib.contextmanager
def transformer_engine_placeholder() -> Iterator[None]:
    """Put a placeholder into sys.modules, unless Transformer Engine is installed.

    It is removed afterwards, so that all other code still sees that Transformer Engine is missing.
    """
    from importlib.util import find_spec  # imported late: it delays commands that do not need it

    names = ("transformer_engine", "transformer_engine.pytorch")
    # A loaded module need not have a spec, and find_spec then raises.
    if names[0] in sys.modules or find_spec(names[0]) is not None:
        yield
        return
    package, pytorch = (_Placeholder(name) for name in names)
    setattr(package, "pytorch", pytorch)  # noqa: B010  a module's attributes are not declared
    sys.modules.update(zip(names, (package, pytorch), strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
