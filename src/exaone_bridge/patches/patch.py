"""The decorators that declare a change to Megatron-Bridge, Megatron-Core or Transformers. No torch.

A patch is a function under one of the three decorators, and a line in `table.PATCHES`, which
`exaone_bridge.register` applies. docs/dev/patches.md lists all of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from exaone_bridge.patches.import_hook import after_import, around_import

__all__ = ["ImportPatch", "Patch", "ValuePatch", "patch", "patch_import", "patch_of", "patch_value"]

_MARK = "_exaone_bridge_patch"


class Patch:
    """Replaces a function or method; applying it again changes nothing.

    The original stays reachable as `__wrapped__` of the function that replaces it.

    Attributes:
        target: "module:function" or "module:Class.method".
        version: the package and version that the patch was written for.
        reason: what goes wrong without the patch, in one sentence.
        replacement: called with the original function and then with the caller's arguments.
    """

    def __init__(
        self, replacement: Callable[..., Any], target: str, version: str, reason: str
    ) -> None:
        self.replacement, self.target = replacement, target
        self.version, self.reason = version, reason

    def apply(self) -> None:
        """Replace the target now if its module is imported, else at the end of its import."""
        after_import(self.target.partition(":")[0], self._replace)

    def _replace(self) -> None:
        import inspect  # imported late: it takes longer than `import exaone_bridge`

        owner, name = self._find()
        original = inspect.getattr_static(owner, name)
        is_classmethod = isinstance(original, classmethod)
        function = original.__func__ if is_classmethod else original
        if patch_of(function) is self:
            return

        @functools.wraps(function)
        def patched(*args: object, **kwargs: object) -> Any:
            return self.replacement(function, *args, **kwargs)

        setattr(patched, _MARK, self)
        setattr(owner, name, classmethod(patched) if is_classmethod else patched)

    def _find(self) -> tuple[Any, str]:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        return functools.reduce(getattr, owners, sys.modules[module]), name


class ValuePatch(Patch):
    """Replaces a value of a module.

    The replacement is called with the present value and returns the new one; called with its own
    result, it must return an equal value.
    """

    def _replace(self) -> None:
        owner, name = self._find()
        setattr(owner, name, self.replacement(getattr(owner, name)))


class ImportPatch(Patch):
    """Enters the replacement's context manager while the module `target` executes."""

    def apply(self) -> None:
        """Install the import hook; it acts when the module is imported, and only then."""
        around_import(self.target, self.replacement)


def patch_of(function: object) -> Patch | None:
    """Return the patch that replaced a function by this one, if one did."""
    found = getattr(function, _MARK, None)
    return found if isinstance(found, Patch) else None


def patch(target: str, *, version: str, reason: str) -> Callable[[Callable[..., Any]], Patch]:
    """Declare that the decorated function replaces the function `target`; see `Patch`."""
    return lambda replacement: Patch(replacement, target, version, reason)


def patch_value(
    target: str, *, version: str, reason: str
) -> Callable[[Callable[[Any], Any]], ValuePatch]:
    """Declare that the decorated function computes the value `target` anew; see `ValuePatch`."""
    return lambda replacement: ValuePatch(replacement, target, version, reason)


def patch_import(
    target: str, *, version: str, reason: str
) -> Callable[[Callable[[], AbstractContextManager[object]]], ImportPatch]:
    """Declare a context around the execution of the module `target`; see `ImportPatch`."""
    return lambda replacement: ImportPatch(replacement, target, version, reason)
