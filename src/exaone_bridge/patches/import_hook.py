"""Hooks that run code around the execution of a module, whenever it is imported. No torch.

Patches need them (`patch.py`), and the registration of our bridges after Megatron-Bridge's own
(`bridge/registration.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes longer than importing all of this package
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

__all__ = ["after_import", "around_import", "import_before"]

_hooks: dict[str, Callable[[], AbstractContextManager[object]]] = {}
_before: list[tuple[re.Pattern[str], str]] = []
_calls: dict[str, list[Callable[[], object]]] = {}  # by module, at the end of its import


class _Loader:
    """The module's own loader, with the hook around `exec_module`."""

    def __init__(self, inner: Loader, around: Callable[[], AbstractContextManager[object]]) -> None:
        self._inner, self._around = inner, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self._around():
            self._inner.exec_module(module)

    def __getattr__(self, name: str) -> object:
        """Return get_source, get_data and others, which tracebacks and resource readers call."""
        if name == "_inner":  # of a copy under construction
            raise AttributeError(name)
        return getattr(self._inner, name)


class _Imported:
    """The loader of a module that was imported while its own import was being found.

    Python would execute it again, by the spec that it has (`importlib._bootstrap._find_spec`), and
    there would be two.
    """

    def __init__(self, module: ModuleType) -> None:
        from importlib.util import spec_from_loader

        self._module, self._spec = module, module.__spec__
        module.__spec__ = spec_from_loader(module.__name__, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Finder:
    """The first finder: for hooked modules, it wraps the loader that the other finders find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for pattern, module in _before:
            if module not in sys.modules and pattern.fullmatch(fullname):
                importlib.import_module(module)
                if (imported := sys.modules.get(fullname)) is not None:
                    _Imported(imported)
                    return imported.__spec__
        around = _hooks.get(fullname)
        if around is None:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, around)  # type: ignore[assignment]
                return spec
        return None


_finder = _Finder()


def around_import(module: str, around: Callable[[], AbstractContextManager[object]]) -> None:
    """Enter `around()` while `module` executes, whenever it is imported.

    A second call for the same module replaces the first.
    """
    _hooks[module] = around
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def import_before(module: str, pattern: str) -> None:
    """Import a module before any other whose full name matches the pattern, if it is not yet."""
    _before.append((re.compile(pattern), module))


def after_import(module: str, call: Callable[[], object]) -> None:
    """Call at the end of the module's import, and now if it is imported; calls add up."""
    calls = _calls.setdefault(module, [])
    if call not in calls:
        calls.append(call)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        yield
        for each in calls:
            each()

    around_import(module, around)
    if sys.modules.get(module) is not None:
        call()
