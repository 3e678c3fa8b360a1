"""Makes Megatron-Bridge's text data sets train on conversations with our models' chat templates.

Conversations that do not fit into a packed sequence are counted.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from exaone_bridge.errors import ConversationError
from exaone_bridge.models import is_supported
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.chat_template import tokenize_chat

__all__ = ["tokenize_chat_example", "tokenize_dataset"]

logger = logging.getLogger(__name__)


@patch(
    "megatron.bridge.data.conversation_processing:tokenize_chat_example",
    version="Megatron-Bridge 0.6.2",
    reason="It knows the turns of six chat formats, and raises for other templates without "
    "{% generation %}, such as those of EXAONE and ERNIE; the last turn is where two renderings "
    "differ, which templates that drop former thinking move.",
)
def tokenize_chat_example(
    original: Callable[..., Any],
    example: Any,
    processor: Any,
    *,
    tool_schemas: Any = None,
    max_length: int | None = None,
    loss_mode: str = "assistant",
    **kwargs: Any,
) -> Any:
    """Tokenize a conversation of a supported model by `tokenize_chat`.

    Args:
        original: Megatron-Bridge's function, which others and `loss_mode="full"` use.
        example: a row with `messages`, `conversation` or `conversations`, or the messages alone.
        processor: a tokenizer of Transformers, or what wraps one.
        tool_schemas: the tools of rows that have none.
        max_length: longer conversations are truncated at their end.
        loss_mode: "assistant", "last_turn" or "full".
        kwargs: further arguments of the original.

    Returns:
        A TokenizedConversation: input_ids [S] int64, assistant_mask [S] bool.
    """
    from megatron.bridge.data.conversation_processing import (
        TokenizedConversation,
        get_processor_tokenizer,
        normalize_chat_conversation,
    )

    tokenizer = get_processor_tokenizer(processor)
    if loss_mode == "full" or not _is_ours(str(getattr(tokenizer, "name_or_path", ""))):
        given = {"tool_schemas": tool_schemas, "max_length": max_length}
        if loss_mode != "assistant":
            given["loss_mode"] = loss_mode
        return original(example, processor, **given, **kwargs)
    import torch

    row = dict(example) if isinstance(example, Mapping) else {"messages": example}
    if "messages" not in row:
        row["messages"] = normalize_chat_conversation(row)
    chat = tokenize_chat(tokenizer, row, last_turn=loss_mode == "last_turn", tools=tool_schemas)
    ends_with_answer = row["messages"][-1]["role"] == "assistant"
    answer_start = chat.last_turn_start if ends_with_answer else len(chat.input_ids)
    input_ids = torch.tensor(chat.input_ids)[:max_length]
    return TokenizedConversation(
        input_ids=input_ids,
        assistant_mask=torch.tensor(chat.assistant_mask)[:max_length],
        conversation=row["messages"],
        final_assistant_start=min(answer_start, len(input_ids)),
    )


@patch(
    "megatron.bridge.data.packing.offline:tokenize_dataset",
    version="Megatron-Bridge 0.6.2",
    reason="Packing leaves out what is longer than a sequence without saying of how many, and "
    "divides by zero where nothing is left.",
)
def tokenize_dataset(
    original: Callable[..., Any],
    path: Path,
    tokenizer: Any,
    max_seq_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Tokenize the rows that packing is to distribute, and leave out those that are too long.

    Args:
        original: Megatron-Bridge's function. With context or sequence parallelism it truncates.
        path: the file of the rows.
        tokenizer: Megatron-Bridge's; the rows of other models than ours are all returned.
        max_seq_length: the length of a packed sequence, in tokens; the last token of a row is a
            label only.
        args, kwargs: further arguments of the original.

    Returns:
        An array of rows; each has input_ids [S] and loss_mask [S].

    Raises:
        ConversationError: all rows are too long.
    """
    from megatron.bridge.data.conversation_processing import get_processor_tokenizer

    rows = original(path, tokenizer, max_seq_length, *args, **kwargs)
    if not _is_ours(str(getattr(get_processor_tokenizer(tokenizer), "name_or_path", ""))):
        return rows
    lengths = [len(row["input_ids"]) - 1 for row in rows]
    fits = [length <= max_seq_length for length in lengths]
    if not any(fits):
        raise ConversationError(
            str(path),
            f"has {len(rows)} rows, all longer than seq_length, {max_seq_length}: the shortest has "
            f"{min(lengths)} tokens",
            remedy="raise seq_length, or pass packed=False, with which rows are truncated",
        )
    if not all(fits):
        logger.warning(
            "%s: %d of %d rows are longer than seq_length, %d, and are left out",
            path,
            fits.count(False),
            len(rows),
            max_seq_length,
        )
    return rows[fits]


@functools.lru_cache(maxsize=16)
def _is_ours(name: str) -> bool:
    """Return whether the config beside a tokenizer is that of a supported model.

    Args:
        name: the tokenizer's directory, or its name on the Hugging Face Hub.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path: object = Path(name) / "config.json"
    if not Path(name).is_dir():
        try:
            path = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return False
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return False
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    return is_supported(SimpleNamespace(architectures=config.get("architectures")))
