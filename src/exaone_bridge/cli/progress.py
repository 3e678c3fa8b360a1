"""The progress of a conversion: a bar on a terminal, elsewhere a line for every tenth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.progress import (
    BarColumn,
    DownloadColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from exaone_bridge.cli.show import console, quiet, say
from exaone_bridge.convert.progress import Summary
from exaone_bridge.runtime.progress import NoProgress, Progress
from exaone_bridge.schema.size_text import size_text

__all__ = ["conversion", "say_summary"]


class _Conversion(NoProgress):
    """Shows a conversion's stages and bytes: on a bar, or in lines where there is no terminal."""

    def __init__(self, command: str, drawn: RichProgress, task: TaskID) -> None:
        self._command, self._drawn, self._task = command, drawn, task
        self._started = time.perf_counter()
        self._done = self._total = self._tenths = 0

    def stage(self, text: str) -> None:
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
        if not console.is_terminal:
            seconds = time.perf_counter() - self._started
            line = f"[{seconds:5.1f} s] {self._command}: {text}"
            console.print(line, markup=False, highlight=False)


@contextlib.contextmanager
def conversion(command: str) -> Iterator[Progress]:
    """Yield a `Progress` whose stages and bytes are shown under the name of the command."""
    quiet()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console, transient=True) as drawn:
        yield _Conversion(command, drawn, drawn.add_task(command, total=None))


def say_summary(folder: object, done: Summary, *, dry_run: bool) -> None:
    """Print the notes of a conversion, and its tensors, bytes, seconds, rate and peak memory.

    Args:
        folder: the output.
        done: what was converted.
        dry_run: whether nothing was written.
    """
    for note in done.notes:
        say(note)
    size = f"{done.tensors} tensors, {size_text(done.nbytes)}"
    if dry_run:
        say(f"{folder}: {size} would be written; nothing was")
        return
    kept = f", {size_text(done.kept_bytes)} of them from an earlier run" if done.kept_bytes else ""
    rate = size_text(done.nbytes / max(done.seconds, 1e-9))
    used = (done.peak_bytes - done.base_bytes) / 2**20
    peak = f"peak memory {done.peak_bytes / 2**30:.2f} GiB per process"
    peak += f" ({used:.0f} MiB of it for tensors)"
    say(f"{folder}: {size}{kept}, {done.seconds:.1f} s, {rate}/s, {peak}")
