"""A conversion's progress: a bar with rate and remaining time on a terminal, elsewhere a line every tenth."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from exaone_bridge.cli.show import console, quiet, say
from exaone_bridge.convert.progress import Advance, Summary, Total

__all__ = ["conversion", "say_summary"]


@contextlib.contextmanager
def conversion(what: str) -> Iterator[Callable[[int, Any], None]]:
    """Show what a conversion says of itself. Yields `on_event`, for stages and for bytes."""
    quiet()
    started = time.perf_counter()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    done = total = tenths = 0
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(what, total=None)

        def line(text: str) -> None:
            if not console.is_terminal:
                seconds = time.perf_counter() - started
                console.print(f"[{seconds:5.1f} s] {what}: {text}", markup=False, highlight=False)

        def on_event(rank: int, event: Any) -> None:
            nonlocal done, total, tenths
            if isinstance(event, Total):
                total, done, tenths = event.nbytes, 0, 0
                progress.reset(task, total=total)
            elif isinstance(event, Advance):
                done += event.nbytes
                progress.advance(task, event.nbytes)
                if total and (now := done * 10 // total) > tenths:
                    tenths = now
                    line(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")
            elif rank == 0:
                progress.update(task, description=f"{what}: {event}")
                line(str(event))

        yield on_event


def say_summary(folder: object, done: Summary, *, dry_run: bool) -> None:
    """The line that a conversion ends with."""
    size = f"{done.tensors} tensors, {done.nbytes / 1e9:.2f} GB"
    if dry_run:
        say(f"{folder}: {size} would be written; nothing was")
        return
    kept = (
        f", {done.kept_bytes / 1e9:.2f} GB of them from an earlier run" if done.kept_bytes else ""
    )
    rate = done.nbytes / 1e9 / max(done.seconds, 1e-9)
    used = (done.peak_bytes - done.base_bytes) / 2**20
    peak = f"peak memory {done.peak_bytes / 2**30:.2f} GiB a process ({used:.0f} MiB of it for tensors)"
    say(f"{folder}: {size}{kept}, {done.seconds:.1f} s, {rate:.2f} GB/s, {peak}")
