"""The launcher interface: runs functions on the ranks of a layout, forked or torchrun's."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from exaone_bridge.runtime.progress import Progress

__all__ = ["Launcher", "choose_launcher", "is_rank_zero", "under_torchrun"]


class Launcher(ABC):
    """Runs functions on ranks: forked ones (`ForkLauncher`) or torchrun's (`TorchrunLauncher`).

    A launcher is a context manager. Leaving it without an error ends what it has started.

    In each method `fn` is called with `args`, and with the keyword argument `progress` if one is
    given. Arguments and results must be picklable.
    """

    @abstractmethod
    def all[T](
        self, fn: Callable[..., T], *args: object, progress: Progress | None = None
    ) -> list[T]:
        """Run `fn` on every rank.

        Returns:
            The results in rank order, on every process.

        Raises:
            BridgeError: the error that a rank raised.
        """

    @abstractmethod
    def first[T](self, fn: Callable[..., T], *args: object, progress: Progress | None = None) -> T:
        """Run `fn` on one rank, while the others wait.

        Returns:
            Its result, on every process.

        Raises:
            BridgeError: the error that it raised, on every process.
        """

    @abstractmethod
    def subprocess[T](
        self, fn: Callable[..., T], *args: object, progress: Progress | None = None
    ) -> T:
        """Run `fn` once, in a process that may fork ranks of its own.

        Args:
            fn: a function of an importable module.

        Returns:
            Its result, on every process.

        Raises:
            BridgeError: the error that it raised, on every process.
            RankFailure: the process died, or raised another error.
        """

    @abstractmethod
    def folder(self) -> AbstractContextManager[Path]:
        """Make a temporary folder, the same for all ranks of this machine, removed at the end."""

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        """End what this launcher has started."""


def under_torchrun() -> bool:
    """Return whether torchrun, or a launcher like it, has started this process as a rank."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_rank_zero() -> bool:
    """Return whether this process prints and writes reports: not rank 1 and up of torchrun."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def choose_launcher(ranks: int = 1) -> Launcher:
    """Choose torchrun's ranks if this process is one of them, and forked ranks otherwise.

    Args:
        ranks: the size of the layout.

    Raises:
        UnsupportedLayout: torchrun has started a number of ranks that is not a multiple of `ranks`.
    """
    if under_torchrun():
        from exaone_bridge.runtime.torchrun import TorchrunLauncher

        return TorchrunLauncher(ranks)
    from exaone_bridge.runtime.fork import ForkLauncher

    return ForkLauncher(ranks)
