"""The errors of exaone_bridge: one small tree, one sentence each.

Every message says what was got, what was wanted, where, and the remedy. None of these
classes imports torch, so a command that refuses bad input does so at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "BridgeError",
    "CheckpointError",
    "OutputError",
    "ParityFailure",
    "PlanError",
    "RegistrationError",
    "UnmappedTensors",
    "UnsupportedConfig",
    "UnsupportedLayout",
    "VisionInputError",
]

_SHOWN = 5
_LONGEST = 800  # characters of a value in a sentence


def _listed(values: Iterable[object], shown: int = _SHOWN) -> str:
    """`a, b, c and 7 more`: a list in a sentence, whatever its length."""
    items = [
        text if (text := str(value)).isprintable() else repr(text) for value in values
    ]  # names come from files
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _short(value: object) -> str:
    """Its repr, and of a long one both ends: values come from files."""
    text = repr(value)
    return (
        text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
    )


def _rebuild(cls: type[BridgeError], message: str, state: dict[str, object]) -> BridgeError:
    error = cls.__new__(cls, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class BridgeError(Exception):
    """The root: everything exaone_bridge raises on purpose is one of these (command-line exit code 2)."""

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # a rank sends its error to the process that started it
        return _rebuild, (type(self), str(self), self.__dict__)


class UnsupportedConfig(BridgeError):
    """A configuration that is not modelled, or that Transformers itself cannot read.

    Args:
        field: the configuration's field, as the file spells it.
        got: its value.
        known: the values that work, if they can be listed.
        wanted: what a value must satisfy, if they cannot.
        where: the file or layer.
        remedy: what to write instead.
    """

    def __init__(
        self,
        field: str,
        *,
        got: object,
        known: Sequence[object] | None = None,
        wanted: str | None = None,
        where: str = "config.json",
        remedy: str = "",
    ) -> None:
        if wanted is None:
            wanted = "one of " + _listed((repr(value) for value in known or ()), shown=40)
        tail = f"; {remedy}" if remedy else ""
        super().__init__(f"{where}: {field} is {_short(got)}, and must be {wanted}{tail}.")
        self.field, self.got = field, got


class UnsupportedLayout(BridgeError):
    """A parallel layout that this model cannot be cut into."""

    def __init__(self, what: str, *, got: object, wanted: str, remedy: str) -> None:
        super().__init__(f"parallel layout: {what} is {got}, and must be {wanted}; {remedy}.")


class UnmappedTensors(BridgeError):
    """Tensors that one side has and the other does not account for; `names` holds all of them."""

    def __init__(self, what: str, names: Iterable[str], *, where: str, remedy: str) -> None:
        self.names = tuple(sorted(names))
        super().__init__(f"{where}: {len(self.names)} {what} ({_listed(self.names)}); {remedy}.")


class VisionInputError(BridgeError):
    """Pixels, grids and the words that hold features' places do not belong together."""


class CheckpointError(BridgeError):
    """A checkpoint on disk that is missing, damaged, unsafe or not what its config says."""

    def __init__(self, path: str | Path, problem: str, *, remedy: str) -> None:
        self.path = Path(path)
        super().__init__(f"{path}: {problem}; {remedy}.")


class OutputError(BridgeError):
    """An output that cannot be written whole; nothing stands under its name, and what was written can be continued."""

    def __init__(self, path: str | Path, problem: str, *, remedy: str) -> None:
        self.path = Path(path)
        super().__init__(f"{path}: {problem}; {remedy}.")


class PlanError(BridgeError):
    """A plan of copies that is no bijection: a fault of ours, found before anything is copied."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(
            f"plan of copies: {place} {problem}; nothing was copied, please report this."
        )
        self.place = place


class RegistrationError(BridgeError):
    """The host looks up another class than ours for an architecture that we claim."""


class ParityFailure(BridgeError):
    """Two things that must be equal are not (command-line exit code 1)."""
