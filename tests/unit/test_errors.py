"""Errors: each message is one line with all its parts, and each error can be pickled."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from exaone_bridge import errors
from exaone_bridge.errors import (
    BridgeError,
    CheckpointError,
    ConversationError,
    HeadInputError,
    OutputError,
    ParityFailure,
    PlanError,
    RegistrationError,
    UnmappedTensors,
    UnsupportedConfig,
    UnsupportedLayout,
    VisionInputError,
)

# Each error with its message and its attributes.
ERRORS: list[tuple[BridgeError, str, dict[str, object]]] = [
    (BridgeError("what, where, remedy."), "what, where, remedy.", {}),
    (
        UnsupportedConfig("rope_type", got="yarn", known=("default", "llama3")),
        "config.json: rope_type is 'yarn', and must be one of 'default', 'llama3'.",
        {"field": "rope_type", "got": "yarn"},
    ),
    (
        UnsupportedConfig(
            "head_dim", got=7, wanted="even", where="a/config.json", remedy="write 8"
        ),
        "a/config.json: head_dim is 7, and must be even; write 8.",
        {"field": "head_dim", "got": 7},
    ),
    (
        UnsupportedConfig("hidden_act", got="two\nlines\x1b[31m", known=("silu",)),
        "config.json: hidden_act is 'two\\nlines\\x1b[31m', and must be one of 'silu'.",
        {"field": "hidden_act", "got": "two\nlines\x1b[31m"},
    ),
    (
        UnsupportedLayout("tp", got=3, wanted="a divisor of 4 heads", remedy="choose another --tp"),
        "parallel layout: tp is 3, and must be a divisor of 4 heads; choose another --tp.",
        {},
    ),
    (
        UnmappedTensors("tensors are missing", ["b", "a"], where="model", remedy="look again"),
        "model: 2 tensors are missing (a, b); look again.",
        {"names": ("a", "b")},
    ),
    (
        UnmappedTensors(
            "tensors are missing", (f"t{n}" for n in range(9)), where="model", remedy="look again"
        ),
        "model: 9 tensors are missing (t0, t1, t2, t3, t4 and 4 more); look again.",
        {"names": tuple(f"t{n}" for n in range(9))},
    ),
    (
        CheckpointError("/a/model.safetensors", "is truncated", remedy="copy it again"),
        "/a/model.safetensors: is truncated; copy it again.",
        {"path": Path("/a/model.safetensors")},
    ),
    (
        CheckpointError(Path("/a"), "is no folder", remedy="give one"),
        "/a: is no folder; give one.",
        {"path": Path("/a")},
    ),
    (
        OutputError("/a", "the disk takes no more", remedy="free some space"),
        "/a: the disk takes no more; free some space.",
        {"path": Path("/a")},
    ),
    (
        PlanError("lm_head.weight", "is filled twice"),
        "reshard plan: lm_head.weight is filled twice; nothing was copied, please report this.",
        {"place": "lm_head.weight"},
    ),
    (
        ConversationError("messages[1]", "has the role 'bot'", remedy="use user"),
        "messages[1] has the role 'bot'; use user.",
        {},
    ),
    (HeadInputError("labels: none."), "labels: none.", {}),
    (VisionInputError("images: 3 tokens and 4 features."), "images: 3 tokens and 4 features.", {}),
    (RegistrationError("another bridge."), "another bridge.", {}),
    (ParityFailure("3 of 5 differ."), "3 of 5 differ.", {}),
]


def test_every_error_class_is_in_the_table() -> None:
    assert {type(error) for error, _, _ in ERRORS} == {
        getattr(errors, name) for name in errors.__all__
    }


@pytest.mark.parametrize(
    ("error", "message", "attributes"), ERRORS, ids=lambda value: type(value).__name__
)
def test_error_has_its_message_and_attributes(
    error: BridgeError, message: str, attributes: dict[str, object]
) -> None:
    assert str(error) == message
    assert vars(error) == attributes
    assert isinstance(error, BridgeError) and isinstance(error, Exception)
    assert len(message.splitlines()) == 1 and message.isprintable()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("error", "message", "attributes"), ERRORS, ids=lambda value: type(value).__name__
)
def test_error_survives_pickling(
    error: BridgeError, message: str, attributes: dict[str, object], protocol: int
) -> None:
    found = pickle.loads(pickle.dumps(error, protocol))
    assert found is not error and type(found) is type(error)
    assert (str(found), vars(found)) == (message, attributes)
    assert found.args == (message,)
    again = pickle.loads(pickle.dumps(found, protocol))
    assert (type(again), str(again), vars(again)) == (type(error), message, attributes)


@pytest.mark.parametrize(
    ("error", "message", "attributes"), ERRORS, ids=lambda value: type(value).__name__
)
def test_error_survives_copying(
    error: BridgeError, message: str, attributes: dict[str, object]
) -> None:
    found = copy.copy(error)
    assert (type(found), str(found), vars(found)) == (type(error), message, attributes)


def test_notes_survive_pickling() -> None:
    error = UnsupportedConfig("a", got=1, wanted="2")
    error.add_note("on rank 3")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["on rank 3"]


def test_rank_failure_survives_pickling() -> None:
    from exaone_bridge.runtime.fork import RankFailure

    found = pickle.loads(pickle.dumps(RankFailure("rank 1: it died")))
    assert (
        type(found) is RankFailure
        and str(found) == "rank 1: it died"
        and isinstance(found, BridgeError)
    )


def test_long_list_of_known_values_is_shortened() -> None:
    message = str(UnsupportedConfig("a", got=0, known=range(1, 100)))
    assert "1, 2, 3" in message and "40 and 59 more" in message and "41" not in message


def test_every_error_derives_from_bridge_error_directly() -> None:
    for name in errors.__all__:
        if name != "BridgeError":
            assert getattr(errors, name).__bases__ == (BridgeError,)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "a\u2028b"], ids=ascii)
def test_message_with_an_unprintable_name_is_one_line(name: str) -> None:
    message = str(
        UnmappedTensors("tensors are missing", [name], where="model", remedy="look again")
    )
    assert len(message.splitlines()) == 1 and message.isprintable()
