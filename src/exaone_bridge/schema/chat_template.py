"""Tokenizes conversations, and finds the tokens that the assistant writes. No torch.

A chat template may mark the assistant's text by `{% generation %}`; Transformers then computes the
mask. The published templates of EXAONE and ERNIE do not mark it. The turns are found by rendering
the conversation once more for each of them, with a placeholder for its text. Nothing is searched
for in text or tokens, so a conversation may contain any of the template's own strings.

The mask covers what the model has to generate: everything after the prompt with which the template
asks for a turn (with thinking or without), up to and including the token that ends the turn.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exaone_bridge.errors import ConversationError
from exaone_bridge.schema.chat_row import read_chat_row
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["TokenizedChat", "tokenize_chat"]

_PLACEHOLDER = "\ufdd0\ufdd1"  # two code points that are no characters, and so in no text
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as in Transformers 5.12.1
_THINKING: tuple[JSONObject, ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})


@dataclass(frozen=True, slots=True)
class TokenizedChat:
    """A conversation of S tokens.

    Attributes:
        input_ids: S token ids, equal to those of Transformers' `apply_chat_template`.
        assistant_mask: S values, true for the tokens that the assistant writes.
        last_turn_start: index of the first token that the assistant writes in its last turn.
    """

    input_ids: list[int]
    assistant_mask: list[bool]
    last_turn_start: int


@dataclass(frozen=True, slots=True)
class _TurnFormat:
    """What a chat template writes around the assistant's text.

    Attributes:
        prompts: texts with which a turn may begin and which the model does not generate, the
            longest first. The last one is the header, with which every turn begins.
        end: what follows the assistant's text, as far as the last special token.
    """

    prompts: tuple[str, ...]
    end: str


@dataclass(frozen=True, slots=True)
class _Turn:
    """Where a turn is in the rendered text, in characters: its header, and what is generated."""

    header: int
    start: int
    stop: int


def tokenize_chat(
    tokenizer: Any,
    row: JSONMapping,
    *,
    last_turn: bool = False,
    tools: Sequence[Any] | None = None,
) -> TokenizedChat:
    """Tokenize a conversation with the tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer of Transformers.
        row: has `messages`, and may have `tools` and `chat_template_kwargs`, as in TRL. A message
            has `role` and `content`, and may have `tool_calls`, beside which the content may be
            null, `reasoning_content`, and other fields that the template reads.
        last_turn: mask all of the assistant's turns but the last.
        tools: the tools of a row without `tools`.

    Raises:
        ConversationError: the conversation is malformed, or the template rejects it or drops the
            assistant's text, tool calls or tools.
    """
    messages, options = read_chat_row(row, tools)
    template = _template(tokenizer, options.get("tools"))
    _check_kwargs(tokenizer, row.get("chat_template_kwargs") or {})
    text = _render(tokenizer, messages, options)
    for tool in options.get("tools") or ():
        _check_rendered(_tool_name(tool), text, f"the tool {_tool_name(tool)!r}")
    _check_text(tokenizer, messages, options, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = _covering(encoded["offset_mapping"])
    is_marked = _GENERATION.search(template) is not None
    turns: list[_Turn] = []
    if last_turn or not is_marked:
        turns = list(_find_turns(tokenizer, template, messages, options, text))
    if is_marked:
        mask = _marked(tokenizer, messages, options)
        last_run = next((i for i in range(len(mask) - 1, 0, -1) if mask[i] > mask[i - 1]), 0)
        start = turns[-1].header if turns else offsets[last_run][0]
    else:
        mask = _overlap(offsets, [(turn.start, turn.stop) for turn in turns])
        start = turns[-1].start
    is_after = (
        (in_loss and stop > start) for in_loss, (_, stop) in zip(mask, offsets, strict=True)
    )
    last_turn_start = next((index for index, found in enumerate(is_after) if found), len(mask))
    if last_turn:
        mask[:last_turn_start] = [False] * last_turn_start
    return TokenizedChat(list(encoded["input_ids"]), mask, last_turn_start)


def _marked(tokenizer: Any, messages: Sequence[JSONMapping], options: JSONMapping) -> list[bool]:
    """Return Transformers' mask, by the marks of the template."""
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **options
    )
    mask = [bool(value) for value in encoded["assistant_masks"]]
    if not any(mask):
        raise ConversationError(
            "the chat template",
            "marks no text of this conversation by {% generation %}",
            remedy="put the assistant's text into the block",
        )
    return mask


def _template(tokenizer: Any, tools: Sequence[Any] | None) -> str:
    """Return the chat template that Transformers chooses; fast tokenizers only."""
    where = f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r}"
    if not getattr(tokenizer, "is_fast", False):
        raise ConversationError(
            where,
            "has no offsets of tokens",
            remedy="use a fast tokenizer (tokenizer.json) of Transformers",
        )
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        raise ConversationError(
            where,
            "has no chat template",
            remedy="add chat_template.jinja to its directory",
        ) from error


def _render(
    tokenizer: Any,
    messages: Sequence[JSONMapping],
    options: JSONMapping,
    **more: object,
) -> str:
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, **{**options, **more})
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ConversationError(
            "the chat template",
            f"rejects the conversation ({error})",
            remedy="change the messages to what it supports",
        ) from error


def _check_kwargs(tokenizer: Any, kwargs: JSONMapping) -> None:
    """Reject names that are not the template's but those of `apply_chat_template` itself."""
    if not kwargs:
        return
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"documents"}
    if names := sorted(reserved & kwargs.keys()):
        raise ConversationError(
            "chat_template_kwargs",
            f"has {', '.join(names)}, which the template does not read",
            remedy="name variables of the template only; `tools` is a field of the row",
        )


def _check_text(
    tokenizer: Any, messages: Sequence[JSONMapping], options: JSONMapping, text: str
) -> None:
    """Check that a template for strings has not written a list of parts, or null, as code."""
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list) and content and str(content) in text:
            raise ConversationError(
                "the chat template",
                f"writes the list of parts in messages[{number}] as code",
                remedy="write the content as a string",
            )
    filled = [
        {**message, "content": ""} if message.get("content") is None else message
        for message in messages
    ]
    if filled != messages and _render(tokenizer, filled, options) != text:
        raise ConversationError(
            "the chat template",
            "writes content that is null as text",
            remedy="write an empty string beside tool_calls",
        )


def _find_turns(
    tokenizer: Any,
    template: str,
    messages: Sequence[JSONMapping],
    options: JSONMapping,
    text: str,
) -> Iterator[_Turn]:
    """Yield the assistant's turns of a rendered conversation."""
    kwargs = {name: value for name, value in options.items() if name != "tools"}
    turn_format = _turn_format(tokenizer, template, json.dumps(kwargs, sort_keys=True))
    if _PLACEHOLDER in text:
        raise ConversationError(
            "messages", "contain U+FDD0 and U+FDD1", remedy="remove them: they are no characters"
        )
    header = turn_format.prompts[-1]
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        probe = [*messages]
        content: Any = _PLACEHOLDER
        if isinstance(message.get("content"), list):
            content = [{"type": "text", "text": _PLACEHOLDER}]
        probe[number] = {"role": "assistant", "content": content}
        rendered = _render(tokenizer, probe, options)
        _check_rendered(_PLACEHOLDER, rendered, f"the text of messages[{number}]")
        before, _, after = rendered.partition(_PLACEHOLDER)
        begin, stop = before.rfind(header), len(text) - len(after)
        if (
            begin < 0
            or not begin <= stop
            or text[:begin] != before[:begin]
            or text[stop:] != after
            or not after.startswith(turn_format.end)
        ):
            raise _depends(f"messages[{number}]")
        written = text[begin:stop]
        _check_turn(message, written, f"of messages[{number}]")
        prompts = (prompt for prompt in turn_format.prompts if written.startswith(prompt))
        prompt = next(prompts, _common_prefix([header, written]))
        yield _Turn(begin, begin + len(prompt), stop + len(turn_format.end))


def _depends(what: str) -> ConversationError:
    return ConversationError(
        what,
        "is rendered by the chat template in a way that depends on other messages",
        remedy="mark the assistant's text in the template by {% generation %}, and train on all "
        "turns",
    )


@functools.lru_cache(maxsize=16)
def _turn_format(tokenizer: Any, template: str, kwargs: str) -> _TurnFormat:
    """Find what a chat template writes around the assistant's text, in a conversation of one turn.

    Args:
        tokenizer: has the template.
        template: the chat template; a change of it is another key of the cache.
        kwargs: the JSON of `chat_template_kwargs`.
    """
    options = json.loads(kwargs)
    user = [{"role": "user", "content": "a"}]
    before = _render(tokenizer, user, options)

    def turn(**message: str) -> str:
        text = _render(tokenizer, [*user, {"role": "assistant", **message}], options)
        if not text.startswith(before):
            raise _depends("a message of the user")
        return text[len(before) :]

    written = turn(content=_PLACEHOLDER)
    _check_rendered(_PLACEHOLDER, written, "the assistant's text")
    head, _, end = written.partition(_PLACEHOLDER)
    thinking = turn(content="b", reasoning_content=_PLACEHOLDER)
    heads = [
        head,
        turn(content="").removesuffix(end),
        thinking.partition(_PLACEHOLDER)[0] if _PLACEHOLDER in thinking else head,
    ]
    prompts = {
        _render(tokenizer, user, options, add_generation_prompt=True, **more).removeprefix(before)
        for more in _THINKING
    } - {""}
    # A prompt with which no turn begins, as in a careless template, says nothing about turns.
    prompts = {
        prompt
        for prompt in prompts
        if any(head.startswith(prompt) or prompt.startswith(head) for head in heads)
    }
    header = _common_prefix([*heads, *prompts])
    # Not `all_special_tokens`: a token may be special without a name, such as ERNIE's.
    added = map(str, tokenizer.added_tokens_decoder.values())
    special = [token for token in added if token in end]
    last = max((end.rfind(token) + len(token) for token in special), default=len(end))
    longest_first = sorted(prompts - {header}, key=len, reverse=True)
    return _TurnFormat((*longest_first, header), end[:last])


def _check_turn(message: JSONMapping, written: str, of: str) -> None:
    """Check that a turn has the assistant's answer and tool calls; a template may drop thinking."""
    content = message.get("content") or ""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    for part in parts:
        _check_rendered(part.rpartition("</think>")[2].strip(), written, f"the text {of}")
    for call in message.get("tool_calls") or ():
        _check_rendered(_tool_name(call), written, f"the tool call {_tool_name(call)!r} {of}")


def _check_rendered(part: str, text: str, what: str) -> None:
    if part not in text:
        raise ConversationError(
            "the chat template",
            f"drops {what}",
            remedy="use a template that renders it, or leave the row out",
        )


def _tool_name(tool: JSONMapping) -> str:
    return str((tool.get("function") or tool).get("name", ""))


def _common_prefix(texts: Sequence[str]) -> str:
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return "".join(column[0] for column in same)


def _covering(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extend the offsets of tokens to the spaces that the tokenizer trims from them."""
    covering, end = [], 0
    for start, stop in offsets:
        covering.append((min(start, end), stop))
        end = max(end, stop)
    return covering


def _overlap(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each token whether it has a character in one of the spans, which are in order."""
    mask, remaining = [], iter(spans)
    span = next(remaining, None)
    for start, stop in offsets:
        while span is not None and span[1] <= start:
            span = next(remaining, None)
        mask.append(span is not None and stop > span[0])
    return mask
