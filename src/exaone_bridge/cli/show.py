"""Prints stages while a command works, and tables at its end."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from exaone_bridge.runtime.progress import NO_PROGRESS, Progress
from exaone_bridge.runtime.progress_bar import progress_bar

__all__ = ["console", "on_stderr", "quiet", "say", "stages", "table"]

console = Console() if sys.stdout.isatty() else Console(width=160)  # a pipe has no width of its own


def quiet() -> None:
    """Silence warnings and logs of libraries, which would be mixed with the output."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


@contextlib.contextmanager
def stages(command: str, *, quiet_libraries: bool = True, shown: bool = True) -> Iterator[Progress]:
    """Yield a `Progress` whose stages are shown.

    Args:
        command: the name before each stage.
        quiet_libraries: whether to silence warnings and logs of libraries.
        shown: whether anything is shown; false on all ranks but one.
    """
    if quiet_libraries:
        quiet()
    if not shown:
        yield NO_PROGRESS
        return
    with progress_bar(command, console, nbytes=False) as drawn:
        yield drawn


@contextlib.contextmanager
def on_stderr(condition: bool) -> Iterator[None]:
    """Print on standard error in the body, if standard output is for something else."""
    before, console.stderr = console.stderr, condition or console.stderr
    try:
        yield
    finally:
        console.stderr = before


def say(line: str) -> None:
    """Print one line without markup: the name of a folder may contain brackets."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; where its words do not fit the terminal's width, a list.

    The first column is aligned left, the others right.
    """
    drawn = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        drawn.add_column(
            column, justify="right" if number else "left", no_wrap=number == 0, overflow="fold"
        )
    for row in rows:
        drawn.add_row(*map(Text, row))
    cells = zip(columns, *rows, strict=True)
    words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in cells]
    words[0] = max(len(row[0]) for row in (columns, *rows))  # it is not wrapped
    if sum(words) + 3 * len(words) + 1 <= console.width:
        console.print(drawn)
        return
    console.print(Text(title))
    for row in rows:
        lines = [f"{name}: {cell}" for name, cell in zip(columns[1:], row[1:], strict=True) if cell]
        console.print(Text(row[0], style="bold"))
        console.print(Padding(Text("\n".join(lines)), (0, 0, 0, 2)))
