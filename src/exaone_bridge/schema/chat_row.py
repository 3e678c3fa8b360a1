"""Reads a row of conversations, in the format of Transformers and TRL, and checks it. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from exaone_bridge.errors import ConversationError
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["read_chat_row"]

_ROLES = ("system", "user", "assistant", "tool")


def read_chat_row(
    row: JSONMapping, tools: Sequence[Any] | None
) -> tuple[list[JSONObject], JSONObject]:
    """Return the checked messages of a row, and the other arguments of `apply_chat_template`.

    Args:
        row: has `messages`, and may have `tools` and `chat_template_kwargs`.
        tools: the tools of a row without `tools`.

    Raises:
        ConversationError: the row is malformed.
    """
    messages = row.get("messages")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConversationError(
            "messages", "is empty or no list", remedy="give each row a list of messages"
        )
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)
    if not any(message["role"] == "assistant" for message in messages):
        raise ConversationError(
            "messages",
            "has no message of the assistant",
            remedy="leave the row out, or add the answer to train on",
        )
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        raise ConversationError(
            "chat_template_kwargs", f"is {options!r}", remedy="write a JSON object"
        )
    found = _read_tools(row.get("tools") or tools)
    return [dict(message) for message in messages], {
        **options,
        **({"tools": found} if found else {}),
    }


def _check_message(where: str, message: Any) -> None:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise ConversationError(
            where, f"has the role {role!r}", remedy=f"use one of {', '.join(_ROLES)}"
        )
    calls = message.get("tool_calls") or ()
    if not _is_list_of_objects(calls):
        raise ConversationError(
            where, f"has the tool_calls {calls!r}", remedy="write a list of objects with `function`"
        )
    content = message.get("content")
    is_text = isinstance(content, str) or (
        _is_list_of_objects(content)
        and all(isinstance(part.get("text", ""), str) for part in content)
    )
    is_result = role == "tool" and content is not None  # which templates may write as JSON
    if not (is_text or is_result or (content is None and calls)):
        raise ConversationError(
            where,
            f"has the content {content!r}",
            remedy="write a string or a list of parts; null is for a message with tool_calls only",
        )


def _read_tools(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ConversationError(
                "tools", f"is a string and no JSON ({error})", remedy="write a list of JSON schemas"
            ) from error
    tools = [tools] if isinstance(tools, Mapping) else tools or []
    if not _is_list_of_objects(tools):
        raise ConversationError("tools", f"is {tools!r}", remedy="write a list of JSON schemas")
    return list(tools)


def _is_list_of_objects(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(each, Mapping) for each in value)
    )
