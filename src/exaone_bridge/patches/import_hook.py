"""Do something around the execution of one module, whenever somebody imports it. No torch, no Megatron.

Two seams of the host need it: one module of Megatron-Bridge that cannot be imported as it stands
(`import_guard.py`), and the moment at which its own bridges have been registered (`registration.py`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it takes longer than importing all of this package
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec

__all__ = ["after_import", "around_import"]

_hooks: dict[str, Callable[[], AbstractContextManager[object]]] = {}


class _Loader:
    """The module's own loader, with the hook around `exec_module`."""

    def __init__(self, inner: Loader, around: Callable[[], AbstractContextManager[object]]) -> None:
        self._inner, self._around = inner, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        with self._around():
            self._inner.exec_module(module)

    def __getattr__(
        self, name: str
    ) -> object:  # get_source, get_data: tracebacks and resource readers ask for them
        if name == "_inner":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._inner, name)


class _Finder:
    """First in line, for hooked modules only: asks the other finders, and wraps the loader they found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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
    """Enter `around()` while `module` executes, whenever it is imported; a second call replaces the first."""
    _hooks[module] = around
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def after_import(name: str, call: Callable[[], object]) -> None:
    """Call at the end of the module's import; now too, if it is imported already."""

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        yield
        call()

    around_import(name, around)
    if name in sys.modules:
        call()
