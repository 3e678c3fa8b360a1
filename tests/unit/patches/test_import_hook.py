"""The import hook, on small packages."""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import inspect
import linecache
import re
import runpy
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from exaone_bridge.patches import import_hook
from exaone_bridge.patches.import_hook import around_import

Events = list[str]
MAIN, SUB = "hooked_package_for_tests", "hooked_package_for_tests.sub"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`package(**{"sub.py": body})` writes a package called MAIN; hooks are restored afterwards."""
    hooks, finders = dict(import_hook._hooks), list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**files: str) -> Path:
        folder = tmp_path / MAIN
        folder.mkdir()
        for name, body in {"__init__.py": "", **files}.items():
            (folder / name).write_text(textwrap.dedent(body))
        importlib.invalidate_caches()
        return folder

    yield write
    import_hook._hooks.clear()
    import_hook._hooks.update(hooks)
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == MAIN]:
        del sys.modules[name]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What happened, in order: modules write into it as `sys.events_for_tests`."""
    found: Events = []
    monkeypatch.setattr(sys, "events_for_tests", found, raising=False)
    return found


def noting(events: Events, name: str = "") -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        events.append(f"enter{name}")
        try:
            yield
        finally:
            events.append(f"exit{name}")

    return around


BODY = "import sys\nsys.events_for_tests.append(__name__.rpartition('.')[2])\n"


def test_the_module_executes_inside_the_context(
    package: Callable[..., Path], events: Events
) -> None:
    package(**{"sub.py": BODY})
    around_import(SUB, noting(events))
    assert events == []  # nothing happens before the import
    importlib.import_module(MAIN)
    assert events == []  # nor at its parent's
    module = importlib.import_module(SUB)
    assert events == ["enter", "sub", "exit"]
    assert importlib.import_module(SUB) is module
    assert events == ["enter", "sub", "exit"]  # once


def test_a_hooked_package_executes_inside_with_all_that_it_imports(
    package: Callable[..., Path], events: Events
) -> None:
    package(
        **{
            "__init__.py": f"{BODY}from {MAIN} import sub\nsys.events_for_tests.append('end')\n",
            "sub.py": BODY,
        }
    )
    around_import(MAIN, noting(events))
    module = importlib.import_module(SUB)
    assert events == ["enter", MAIN, "sub", "end", "exit"]
    assert sys.modules[MAIN].sub is module


def test_two_hooked_modules_keep_their_own_contexts(
    package: Callable[..., Path], events: Events
) -> None:
    package(**{"__init__.py": f"{BODY}import {SUB}\n", "sub.py": BODY})
    around_import(MAIN, noting(events, " outer"))
    around_import(SUB, noting(events, " inner"))
    importlib.import_module(MAIN)
    assert events == ["enter outer", MAIN, "enter inner", "sub", "exit inner", "exit outer"]


def test_an_exception_leaves_the_context_and_the_next_import_tries_again(
    package: Callable[..., Path], events: Events
) -> None:
    package(
        **{"sub.py": BODY + "if len(sys.events_for_tests) < 3:\n    raise KeyError('injected')\n"}
    )
    around_import(SUB, noting(events))
    with pytest.raises(KeyError, match="injected"):
        importlib.import_module(SUB)
    assert events == ["enter", "sub", "exit"]
    assert SUB not in sys.modules
    importlib.import_module(SUB)
    assert events == ["enter", "sub", "exit"] * 2


def test_an_exception_of_the_context_stops_the_import(
    package: Callable[..., Path], events: Events
) -> None:
    package(**{"sub.py": BODY})

    @contextlib.contextmanager
    def proving() -> Iterator[None]:
        yield
        raise LookupError("in the context")

    around_import(SUB, proving)
    with pytest.raises(LookupError, match="in the context"):
        importlib.import_module(SUB)
    assert events == ["sub"] and SUB not in sys.modules


def test_the_module_is_as_python_would_have_made_it(
    package: Callable[..., Path], events: Events
) -> None:
    body = (
        BODY
        + "def spoken():\n    return 'here'\n\n\ndef fails():\n    raise KeyError('injected')\n"
    )
    folder = package(**{"sub.py": body, "data.txt": "some text"})
    around_import(SUB, noting(events))
    around_import(MAIN, noting(events))
    module, parent = importlib.import_module(SUB), importlib.import_module(MAIN)
    assert module.__name__ == SUB and module.__package__ == MAIN
    assert module.__file__ == str(folder / "sub.py") == module.__spec__.origin
    assert module.__cached__ == importlib.util.cache_from_source(module.__file__)
    assert parent.__path__ == [str(folder)] and parent.sub is module
    # Readers of source: inspect, tracebacks of a file that is gone, resources.
    assert inspect.getsource(module.spoken).startswith("def spoken")
    assert module.__loader__.get_source(SUB) == body
    assert module.__loader__.get_filename(SUB) == module.__file__
    assert module.__loader__.is_package(SUB) is False and parent.__loader__.is_package(MAIN) is True
    assert (importlib.resources.files(MAIN) / "data.txt").read_text() == "some text"
    linecache.clearcache()
    with pytest.raises(KeyError) as caught:
        module.fails()
    assert "raise KeyError('injected')" in "".join(traceback.format_exception(caught.value))
    with pytest.raises(AttributeError):
        _ = module.__loader__.no_such_thing


def test_reload_and_run_as_a_script(package: Callable[..., Path], events: Events) -> None:
    package(**{"sub.py": BODY + "value = 1\n"})
    around_import(SUB, noting(events))
    module = importlib.import_module(SUB)
    assert importlib.reload(module) is module
    assert events == ["enter", "sub", "exit"] * 2
    del sys.modules[SUB]
    assert runpy.run_module(SUB)["value"] == 1  # through the loader's get_code


def test_compiled_code_is_used_as_ever(
    package: Callable[..., Path], events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    package(**{"sub.py": BODY})
    around_import(SUB, noting(events))
    cached = importlib.import_module(SUB).__cached__
    assert Path(cached).is_file()
    del sys.modules[SUB]
    importlib.import_module(SUB)
    assert events == ["enter", "sub", "exit"] * 2


def test_other_modules_are_not_touched(package: Callable[..., Path], events: Events) -> None:
    package(**{"sub.py": BODY, "other.py": BODY})
    around_import(SUB, noting(events))
    importlib.import_module(SUB)
    other = importlib.import_module(f"{MAIN}.other")
    assert type(other.__loader__) is SourceFileLoader
    assert type(sys.modules[SUB].__loader__) is not SourceFileLoader
    assert events == ["enter", "sub", "exit", "other"]


def test_a_second_hook_replaces_the_first(package: Callable[..., Path], events: Events) -> None:
    package(**{"sub.py": BODY})
    around_import(SUB, noting(events, " first"))
    around_import(SUB, noting(events, " second"))
    importlib.import_module(SUB)
    assert events == ["enter second", "sub", "exit second"]


def test_there_is_one_finder_and_it_is_asked_first() -> None:
    around_import("no_such_module_for_tests", contextlib.nullcontext)
    around_import("no_such_module_for_tests", contextlib.nullcontext)
    assert sys.meta_path.count(import_hook._finder) == 1
    del import_hook._hooks["no_such_module_for_tests"]


def test_the_finder_comes_back_where_somebody_took_it_away(
    package: Callable[..., Path], events: Events
) -> None:
    package(**{"sub.py": BODY})
    sys.meta_path.remove(import_hook._finder)
    around_import(SUB, noting(events))
    importlib.import_module(SUB)
    assert events == ["enter", "sub", "exit"]


def test_a_missing_module_is_missing_as_ever(package: Callable[..., Path], events: Events) -> None:
    package()
    around_import(f"{MAIN}.absent", noting(events))
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"{MAIN}.absent")
    assert caught.value.name == f"{MAIN}.absent" and events == []
    assert importlib.util.find_spec(f"{MAIN}.absent") is None


def test_looking_for_a_module_does_not_execute_it(
    package: Callable[..., Path], events: Events
) -> None:
    folder = package(**{"sub.py": BODY})
    around_import(SUB, noting(events))
    spec = importlib.util.find_spec(SUB)
    assert spec is not None and spec.origin == str(folder / "sub.py") and events == []


def test_a_module_that_is_imported_already_is_left_alone(
    package: Callable[..., Path], events: Events
) -> None:
    package(**{"sub.py": BODY})
    module = importlib.import_module(SUB)
    around_import(SUB, noting(events))
    assert importlib.import_module(SUB) is module and events == ["sub"]


def test_a_package_without_init_still_imports(package: Callable[..., Path], events: Events) -> None:
    (package() / "__init__.py").unlink()
    importlib.invalidate_caches()
    around_import(MAIN, noting(events))
    module = importlib.import_module(MAIN)
    assert (
        module.__spec__.origin is None and len(list(module.__path__)) == 1
    )  # a namespace: no code to be around


def test_a_loader_can_be_copied(package: Callable[..., Path], events: Events) -> None:
    import copy

    package(**{"sub.py": BODY})
    around_import(SUB, noting(events))
    copied = copy.copy(importlib.import_module(SUB).__loader__)
    assert copied.get_source(SUB) == BODY


def test_a_module_that_the_one_before_it_imports_executes_once(
    package: Callable[..., Path], events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise there are two, whose classes differ."""
    first = f"{MAIN}.first"
    package(**{"sub.py": BODY, "first.py": f"import {SUB} as sub\n{BODY}"})
    monkeypatch.setattr(import_hook, "_before", [])
    import_hook.import_before(first, re.escape(SUB))
    around_import("no.such.module", noting(events))  # installs the finder
    sub = importlib.import_module(SUB)
    assert events == ["sub", "first"]
    assert sub is sys.modules[SUB] is sys.modules[first].sub
    assert inspect.getsource(sub) == BODY and importlib.reload(sub) is sub
