"""The progress of a conversion: a bar on a terminal, elsewhere a line for every tenth."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from exaone_bridge.cli.show import console, quiet, say
from exaone_bridge.convert.progress import Summary
from exaone_bridge.runtime.progress import Progress
from exaone_bridge.runtime.progress_bar import progress_bar
from exaone_bridge.schema.size_text import size_text

__all__ = ["conversion", "say_summary"]


@contextlib.contextmanager
def conversion(command: str) -> Iterator[Progress]:
    """Yield a `Progress` whose stages and bytes are shown under the name of the command."""
    quiet()
    with progress_bar(command, console, nbytes=True) as drawn:
        yield drawn


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
