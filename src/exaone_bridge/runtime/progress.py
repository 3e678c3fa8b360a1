"""The protocol through which long work reports its progress. Imports no torch."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NO_PROGRESS", "NoProgress", "Progress"]


class Progress(Protocol):
    """Receives the progress of long work: the name of the current stage, and bytes processed in it.

    A `Launcher` carries it to the ranks: it hands each rank an object of its own to report to.
    """

    def stage(self, text: str) -> None:
        """Report that a new stage begins; of a function that runs on all ranks, rank 0 reports."""

    def total(self, nbytes: int) -> None:
        """Report how many bytes all ranks together will process."""

    def advance(self, nbytes: int) -> None:
        """Report that this rank has processed `nbytes` more bytes."""

    def output(self, text: str) -> None:
        """Report a piece of the text that the work produces."""


class NoProgress:
    """A `Progress` that drops every report."""

    def stage(self, text: str) -> None:
        """Drop the report."""

    def total(self, nbytes: int) -> None:
        """Drop the report."""

    def advance(self, nbytes: int) -> None:
        """Drop the report."""

    def output(self, text: str) -> None:
        """Drop the text."""


NO_PROGRESS = NoProgress()
