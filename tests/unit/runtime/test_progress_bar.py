"""The progress that the Python API shows: on a terminal, in a notebook, in lines, or not at all."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import pytest

from exaone_bridge.runtime.progress import NO_PROGRESS, NoProgress, Progress
from exaone_bridge.runtime.progress_bar import shown_progress


def _work(progress: Progress) -> None:
    progress.stage("reading <a>")
    progress.total(2 * 10**9)
    progress.advance(10**9)
    progress.advance(10**9)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a notebook displays; IPython is replaced, because the environment has none."""
    shown: list[str] = []

    class Handle:
        def update(self, value: Any, raw: bool = False) -> None:
            shown.append(value["text/html"] if raw else value._repr_html_())

    def display(value: Any, display_id: bool) -> Handle:
        assert display_id and repr(value) == "import"
        shown.append(value._repr_html_())
        return Handle()

    ipython: Any = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    return shown


def test_a_notebook_shows_one_bar_and_removes_it(outputs: list[str]) -> None:
    with contextlib.suppress(KeyError), shown_progress("import", None, nbytes=True) as progress:
        _work(progress)
        progress.stage("ends")
        raise KeyError
    assert outputs[0].startswith("<progress></progress> import (")
    assert "import: reading &lt;a&gt; (" in outputs[1]
    assert '<progress value="2000000000" max="2000000000">' in outputs[-2]
    assert "2.00 GB of 2.00 GB" in outputs[-2] and outputs[-1] == ""


def test_nothing_is_shown_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown_progress("verify", None) as progress:
        assert progress is NO_PROGRESS
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown_progress("verify", None) as progress:
        assert progress is not NO_PROGRESS
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for given in (False, True, None):
        with shown_progress("verify", given) as progress:
            assert progress is NO_PROGRESS
    own = NoProgress()
    with shown_progress("verify", own) as progress:
        assert progress is own


def test_lines_go_to_stderr_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress("import", True, nbytes=True) as progress:
        _work(progress)
    out, err = capsys.readouterr()
    assert out == "" and "s] import: reading <a>" in err and "s] import: 2.00 GB of 2.00 GB" in err
