"""Token ids and the assistant's mask of conversations, compared with those of Transformers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from exaone_bridge.errors import ConversationError
from exaone_bridge.schema.chat_template import tokenize_chat
from tests.helpers.chat import TEMPLATES, TOOLS, conversations, tokenizer, unmarked

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "zebra"}


def _reference(model_tokenizer: Any, name: str, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Transformers' token ids and mask, by the marks of the template."""
    options = dict(row.get("chat_template_kwargs", {}))
    if "tools" in row:
        options["tools"] = row["tools"]
    marked = model_tokenizer.apply_chat_template(
        row["messages"],
        chat_template=TEMPLATES[name][0],
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options,
    )
    return marked["input_ids"], marked["assistant_masks"]


def _written(model_tokenizer: Any, row: dict[str, Any], **options: Any) -> str:
    """The text of the tokens that are in the loss."""
    chat = tokenize_chat(model_tokenizer, row, **options)
    pairs = zip(chat.input_ids, chat.assistant_mask, strict=True)
    return str(model_tokenizer.decode([token for token, in_loss in pairs if in_loss]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_mask_of_1000_conversations_equal_transformers(name: str) -> None:
    """Templates do not mark the assistant's text, and texts contain the templates' own strings."""
    model_tokenizer = tokenizer(name)
    in_loss = 0
    for row in conversations(name, 1000):
        chat = tokenize_chat(model_tokenizer, row)
        tokens, mask = _reference(model_tokenizer, name, row)
        assert chat.input_ids == tokens, row
        assert chat.assistant_mask == [bool(value) for value in mask], row
        in_loss += sum(mask)
    assert in_loss > 10_000


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_with_marks_and_the_last_turn(name: str) -> None:
    """The last turn's mask is the mask of all turns without that of all turns but the last."""
    plain, marked = tokenizer(name), tokenizer(name)
    marked.chat_template = TEMPLATES[name][0]
    for row in conversations(name, 30, seed=1):
        tokens, mask = _reference(plain, name, row)
        found = tokenize_chat(marked, row)
        assert (found.input_ids, found.assistant_mask) == (tokens, [bool(one) for one in mask])
        last = tokenize_chat(plain, row, last_turn=True)
        assert tokenize_chat(marked, row, last_turn=True) == last
        start = last.last_turn_start
        assert last.assistant_mask == [False] * start + found.assistant_mask[start:]
        answers = [one for one in row["messages"] if one["role"] == "assistant"]
        text = _written(plain, row, last_turn=True)
        assert text.count(answers[-1]["content"]) == 1 and found.assistant_mask[start]
        assert (
            len(text) < len(answers[-1]["content"] + answers[-1].get("reasoning_content", "")) + 40
        )


@pytest.mark.parametrize(
    ("name", "message", "options", "written"),
    [
        # What the prompt has is not generated: with thinking, without it, and bare.
        ("exaone4-published", ANSWER, {}, "zebra[|endofturn|]"),
        (
            "exaone4-published",
            ANSWER | {"reasoning_content": "why"},
            {"skip_think": False},
            "why\n</think>\n\nzebra[|endofturn|]",
        ),
        ("exaone4-published", ANSWER | {"reasoning_content": "why"}, {}, "zebra[|endofturn|]"),
        ("exaone4-published", ANSWER | {"content": ""}, {}, "[|endofturn|]"),
        ("exaone-moe", ANSWER, {}, "zebra<|endofturn|>"),
        ("exaone-moe", ANSWER | {"content": "<think>why"}, {}, "why<|endofturn|>"),
        ("exaone-moe", ANSWER | {"content": "<thin"}, {}, "<thin<|endofturn|>"),
        ("exaone45", ANSWER | {"content": [{"type": "text", "text": "a"}]}, {}, "a[|endofturn|]"),
        ("ernie45", ANSWER | {"content": "한"}, {}, "한<|end_of_sentence|>"),
    ],
)
def test_the_mask_covers_what_the_model_generates(
    name: str, message: dict[str, Any], options: dict[str, Any], written: str
) -> None:
    model_tokenizer = tokenizer(name)
    row = {"messages": [USER, message], "chat_template_kwargs": options}
    assert _written(model_tokenizer, row) == written


def test_spaces_that_a_tokenizer_trims_from_offsets_are_in_the_mask() -> None:
    """Transformers' own mask loses a turn that begins with one."""
    from tokenizers import processors

    model_tokenizer = tokenizer("exaone-moe")
    model_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = {"messages": [USER, ANSWER | {"content": "  a  "}]}
    assert _written(model_tokenizer, row) == "  a  <|endofturn|>"


def test_tools_may_be_json_and_come_from_the_data_set() -> None:
    import json

    model_tokenizer = tokenizer("exaone4-published")
    row = {"messages": [USER, ANSWER]}
    with_tools = tokenize_chat(model_tokenizer, row | {"tools": TOOLS})
    assert with_tools == tokenize_chat(model_tokenizer, row | {"tools": json.dumps(TOOLS)})
    assert with_tools == tokenize_chat(model_tokenizer, row, tools=TOOLS)
    assert len(with_tools.input_ids) > len(tokenize_chat(model_tokenizer, row).input_ids)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}
DROPPED = "the chat template drops "


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("exaone4", {}, "messages is empty or no list; give each row a list"),
        ("exaone4", {"messages": []}, "messages is empty or no list"),
        ("exaone4", {"messages": "hello"}, "messages is empty or no list"),
        ("exaone4", {"messages": [USER, {"role": "bot"}]}, "messages[1] has the role 'bot'; use"),
        ("exaone4", {"messages": ["hello"]}, "messages[0] has the role None; use one of system"),
        ("exaone4", {"messages": [USER]}, "has no message of the assistant"),
        ("ernie45", {"messages": [USER, ANSWER], "tools": TOOLS}, DROPPED + "the tool 'weather'"),
        (
            "ernie45",
            {"messages": [USER, ANSWER | {"tool_calls": [CALL]}]},
            DROPPED + "the tool call 'weather' of messages[1]",
        ),
        (
            "exaone4-published",
            {"messages": [USER, ANSWER | {"tool_calls": [{"function": {"name": "f"}}]}]},
            "the chat template rejects the conversation",
        ),
        ("exaone4", {"messages": [USER, ANSWER | {"content": "\ufdd0\ufdd1"}]}, "U+FDD0"),
        (
            "exaone4",
            {"messages": [USER, ANSWER | {"content": None}]},
            "messages[1] has the content",
        ),
        (
            "exaone4",
            {"messages": [USER | {"content": None}, ANSWER]},
            "messages[0] has the content",
        ),
        ("exaone4", {"messages": [{"role": "user"}, ANSWER]}, "null is for a message with tool_ca"),
        ("exaone4", {"messages": [USER, ANSWER | {"content": 5}]}, "messages[1] has the content 5"),
        (
            "exaone4",
            {"messages": [USER | {"content": [{"text": 5}]}, ANSWER]},
            "messages[0] has the",
        ),
        (
            "exaone4",
            {"messages": [USER | {"content": [{"type": "text", "text": "q"}]}, ANSWER]},
            "writes the list of parts in messages[0] as code; write the content as a string",
        ),
        (
            "nulls",
            {"messages": [USER, ANSWER | {"content": None, "tool_calls": [CALL]}]},
            "writes content that is null as text; write an empty string beside tool_calls",
        ),
        ("exaone4", {"messages": [USER, ANSWER | {"tool_calls": "f"}]}, "has the tool_calls 'f'"),
        ("exaone4", {"messages": [USER, ANSWER | {"tool_calls": CALL}]}, "has the tool_calls {"),
        ("exaone4", {"messages": [USER, ANSWER], "tools": "{"}, "tools is a string and no JSON"),
        ("exaone4", {"messages": [USER, ANSWER], "tools": ["f"]}, "tools is ['f']; write a list"),
        (
            "exaone4",
            {"messages": [USER, ANSWER], "chat_template_kwargs": "{}"},
            "chat_template_kwargs is '{}'; write a JSON object",
        ),
        *(
            (
                "exaone4",
                {"messages": [USER, ANSWER], "chat_template_kwargs": {name: True}},
                f"chat_template_kwargs has {name}, which the template does not read",
            )
            for name in ("add_generation_prompt", "continue_final_message", "tools", "tokenize")
        ),
    ],
)
def test_a_bad_conversation_raises(name: str, row: dict[str, Any], message: str) -> None:
    model_tokenizer = tokenizer("exaone4" if name == "nulls" else name)
    if name == "nulls":  # tool calls are written, and Python's None with them
        model_tokenizer.chat_template = (
            "{% for m in messages %}[|{{ m.role }}|]{{ m.content }}{{ m.tool_calls }}{% endfor %}"
        )
    with pytest.raises(ConversationError, match=re.escape(message)):
        tokenize_chat(model_tokenizer, row)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; add chat_template.jinja"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "drops the assistant's text"),
        (
            "{% for m in messages %}{{ m.role }}{% if loop.index0 != 3 %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            "drops the text of messages[3]",
        ),
        (
            "{% for m in messages %}{{ m.role }}{{ m.content[:2] }}{% endfor %}",
            "drops the text of messages[1]",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ messages[-1].content }}{% endfor %}",
            "in a way that depends on other messages; mark the assistant's text",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "marks no text of this conversation by {% generation %}",
        ),
    ],
)
def test_a_bad_template_raises(template: str | None, message: str) -> None:
    model_tokenizer = tokenizer("exaone4")
    model_tokenizer.chat_template = template
    with pytest.raises(ConversationError, match=re.escape(message)):
        tokenize_chat(model_tokenizer, {"messages": [USER, ANSWER] * 2})


def test_a_tokenizer_without_offsets_raises() -> None:
    class Slow:
        is_fast, name_or_path = False, "model"

    with pytest.raises(ConversationError, match="the tokenizer 'model' has no offsets of tokens"):
        tokenize_chat(Slow(), {"messages": [USER, ANSWER]})


def test_the_marks_are_removed() -> None:
    assert all("generation %}" not in unmarked(template) for template, _ in TEMPLATES.values())
