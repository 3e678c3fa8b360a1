"""What the command line prints: stages while it works, tables at the end."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

__all__ = ["console", "quiet", "say", "stages", "table"]

console = Console() if sys.stdout.isatty() else Console(width=160)  # a pipe has no width of its own


def quiet() -> None:
    """Leave the output to us: what libraries warn of is not a user's business here."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


@contextlib.contextmanager
def stages(
    what: str, *, quiet_libraries: bool = True, shown: bool = True
) -> Iterator[Callable[[int, Any], None]]:
    """Show what is being done: a spinner on a terminal, a line a stage elsewhere; nothing unless `shown`.

    Yields `on_event`.
    """
    if quiet_libraries:
        quiet()
    if not shown:
        yield lambda rank, stage: None
        return
    last = ""
    started = time.perf_counter()

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(what)

        def on_event(rank: int, stage: Any) -> None:
            nonlocal last
            if rank != 0 or stage == last:
                return
            last = stage
            progress.update(task, description=f"{what}: {stage}")
            if not console.is_terminal:
                console.print(
                    f"[{time.perf_counter() - started:5.1f} s] {what}: {stage}",
                    markup=False,
                    highlight=False,
                )

        yield on_event


def say(line: str) -> None:
    """Print one line as it is: a folder's name may look like markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; columns of figures, all but the first, are set to the right."""
    drawn = Table(title=Text(title), title_justify="left")
    for number, column in enumerate(columns):
        drawn.add_column(
            column, justify="right" if number else "left", no_wrap=number == 0, overflow="fold"
        )
    for row in rows:
        drawn.add_row(*map(Text, row))
    console.print(drawn)
