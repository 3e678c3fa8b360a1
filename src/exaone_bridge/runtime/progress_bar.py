"""Shows the progress of long work: on a terminal, in a notebook, or in lines. Imports no torch.

`rich` draws on terminals. A notebook needs no widgets: the cell's output is replaced in place.
"""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from exaone_bridge.runtime.launch import is_rank_zero
from exaone_bridge.runtime.progress import NO_PROGRESS, NoProgress, Progress
from exaone_bridge.schema.size_text import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["progress_bar", "shown_progress"]

_SECONDS_BETWEEN_UPDATES = 0.1


class _Terminal(NoProgress):
    """Shows stages and bytes on a bar, or in lines where there is no terminal."""

    def __init__(self, command: str, drawn: RichProgress, task: TaskID) -> None:
        self._command, self._drawn, self._task = command, drawn, task
        self._last, self._started = "", time.perf_counter()
        self._done = self._total = self._tenths = 0

    def stage(self, text: str) -> None:
        if text != self._last:
            self._last = text
            self._drawn.update(self._task, description=f"{self._command}: {text}")
            self._line(text)

    def total(self, nbytes: int) -> None:
        self._total, self._done, self._tenths = nbytes, 0, 0
        self._drawn.reset(self._task, total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._drawn.advance(self._task, nbytes)
        if self._total and (tenths := self._done * 10 // self._total) > self._tenths:
            self._tenths = tenths
            self._line(f"{size_text(self._done)} of {size_text(self._total)}")

    def _line(self, text: str) -> None:
        if not self._drawn.console.is_terminal:
            seconds = time.perf_counter() - self._started
            line = f"[{seconds:5.1f} s] {self._command}: {text}"
            self._drawn.console.print(line, markup=False, highlight=False)


class _Notebook(NoProgress):
    """Shows stages and bytes in the output of a notebook's cell."""

    def __init__(self, command: str) -> None:
        from IPython.display import display

        self._command, self._text, self._done, self._total = command, command, 0, 0
        self._updated, self._started = 0.0, time.perf_counter()
        self._handle: Any = display(self, display_id=True)

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        share = f' value="{self._done}" max="{self._total}"' if self._total else ""
        size = f", {size_text(self._done)} of {size_text(self._total)}" if self._total else ""
        seconds = time.perf_counter() - self._started
        return f"<progress{share}></progress> {html.escape(self._text)}{size} ({seconds:.0f} s)"

    def stage(self, text: str) -> None:
        self._text = f"{self._command}: {text}"
        self._update()

    def total(self, nbytes: int) -> None:
        self._total, self._done = nbytes, 0
        self._update()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if time.perf_counter() - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._update()

    def _update(self) -> None:
        self._updated = time.perf_counter()
        self._handle.update(self)

    def clear(self) -> None:
        """Remove the bar: the result of the cell takes its place."""
        self._handle.update({"text/html": "", "text/plain": ""}, raw=True)


@contextlib.contextmanager
def progress_bar(command: str, console: Console, *, nbytes: bool) -> Iterator[Progress]:
    """Yield a `Progress` that is shown on a console; its last state is removed from a terminal.

    Args:
        command: the name before each stage.
        console: where it is shown.
        nbytes: whether the work has a size; a bar is drawn then.
    """
    from rich import progress as columns

    size = (
        columns.BarColumn(),
        columns.DownloadColumn(),
        columns.TransferSpeedColumn(),
        columns.TimeElapsedColumn(),
        columns.TimeRemainingColumn(),
    )
    with columns.Progress(
        columns.SpinnerColumn(),
        columns.TextColumn("{task.description}"),
        *(size if nbytes else (columns.TimeElapsedColumn(),)),
        console=console,
        transient=True,
    ) as drawn:
        yield _Terminal(command, drawn, drawn.add_task(command, total=None))


@contextlib.contextmanager
def shown_progress(
    command: str, progress: Progress | bool | None, *, nbytes: bool = False
) -> Iterator[Progress]:
    """Yield the `Progress` that a function of the Python API reports to.

    Args:
        command: the name before each stage.
        progress: the argument of that function: an object of the caller's; False: none; True: a bar
            in a notebook or on stderr; None: a bar if stderr is a terminal, or in a notebook.
        nbytes: whether the work has a size.
    """
    if progress is not None and not isinstance(progress, bool):
        yield progress
        return
    notebook = _in_notebook()
    if progress is False or not is_rank_zero() or not (progress or notebook or _on_terminal()):
        yield NO_PROGRESS
    elif notebook:
        shown = _Notebook(command)
        try:
            yield shown
        finally:
            shown.clear()
    else:
        from rich.console import Console

        with progress_bar(command, Console(stderr=True), nbytes=nbytes) as drawn:
            yield drawn


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
