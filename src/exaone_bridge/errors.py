"""The errors that exaone_bridge raises on purpose. No torch.

Each message is one sentence: what was got, what was wanted, where, and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = [
    "BridgeError",
    "CheckpointError",
    "ConversationError",
    "HeadInputError",
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
    """Return `a, b, c and 7 more`: a list of any length in a sentence."""
    items = [
        text if (text := str(value)).isprintable() else repr(text) for value in values
    ]  # names come from files
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _short(value: object) -> str:
    """Return the repr, or both ends of a long one: values come from files."""
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
    """Base class of the errors that exaone_bridge raises on purpose (exit code 2 of the CLI)."""

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # pickled when a rank sends its error to the process that started it
        return _rebuild, (type(self), str(self), self.__dict__)


_MESSAGE_ONLY: object = object()


class UnsupportedConfig(BridgeError):
    """A config that is not supported, or that Transformers itself cannot read.

    Megatron-Core raises an error of a module's constructor again as `type(error)(message)`
    (`build_module`, transformer/spec_utils.py, 0.19.2): the first argument alone is a message.

    Args:
        field: the config's field, as it is in the file.
        got: its value.
        known: the supported values, if they can be listed.
        wanted: the condition on the value, if they cannot.
        where: the file or layer.
        remedy: what to write instead.
    """

    def __init__(
        self,
        field: str,
        *,
        got: object = _MESSAGE_ONLY,
        known: Sequence[object] | None = None,
        wanted: str | None = None,
        where: str = "config.json",
        remedy: str = "",
    ) -> None:
        self.field, self.got = field, got
        if got is _MESSAGE_ONLY:
            super().__init__(field)
            return
        if wanted is None:
            wanted = "one of " + _listed((repr(value) for value in known or ()), shown=40)
        tail = f"; {remedy}" if remedy else ""
        super().__init__(f"{where}: {field} is {_short(got)}, and must be {wanted}{tail}.")


class UnsupportedLayout(BridgeError):
    """A parallel layout that cannot shard this model."""

    def __init__(self, what: str, *, got: object, wanted: str, remedy: str) -> None:
        super().__init__(f"parallel layout: {what} is {got}, and must be {wanted}; {remedy}.")


class UnmappedTensors(BridgeError):
    """Missing or unexpected tensors or parameters.

    Attributes:
        names: all of them, sorted.
    """

    def __init__(self, what: str, names: Iterable[str], *, where: str, remedy: str) -> None:
        self.names = tuple(sorted(names))
        super().__init__(f"{where}: {len(self.names)} {what} ({_listed(self.names)}); {remedy}.")


class VisionInputError(BridgeError):
    """Pixel values, grids and placeholder tokens that do not match."""


class ConversationError(BridgeError):
    """A conversation that cannot be trained on, or a chat template that does not render it."""

    def __init__(self, what: str, problem: str, *, remedy: str) -> None:
        super().__init__(f"{what} {problem}; {remedy}.")


class HeadInputError(BridgeError):
    """Tokens, padding or labels that a model with a head cannot take."""


class CheckpointError(BridgeError):
    """A checkpoint on disk that is missing, damaged, unsafe, or does not match its config."""

    def __init__(self, path: str | Path, problem: str, *, remedy: str) -> None:
        self.path = Path(path)
        super().__init__(f"{path}: {problem}; {remedy}.")


class OutputError(BridgeError):
    """An output that cannot be completed: nothing is under its name."""

    def __init__(self, path: str | Path, problem: str, *, remedy: str) -> None:
        self.path = Path(path)
        super().__init__(f"{path}: {problem}; {remedy}.")


class PlanError(BridgeError):
    """A reshard plan that is not a bijection: a bug in exaone_bridge, found before any copy."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(
            f"reshard plan: {place} {problem}; nothing was copied, please report this."
        )
        self.place = place


class RegistrationError(BridgeError):
    """Megatron-Bridge finds another bridge for an architecture than the one registered here."""


class ParityFailure(BridgeError):
    """A check of equality fails (exit code 1 of the CLI)."""
