"""A bad line of a data set is named before a run reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from exaone_bridge.errors import BridgeError
from exaone_bridge.recipes.rows import CONVERSATIONS, PROMPTS, check_rows

CHAT = b'{"messages": []}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CHAT * 2, None),
        (CHAT.strip(), None),  # without a last newline
        (CHAT.replace(b"\n", b"\r\n"), None),
        ('{"messages": ["\u2028\u0085"]}\n'.encode(), None),  # which `splitlines` would split
        (b"", "training.jsonl is empty; write a JSON object on each line"),
        (CHAT + b"\n" + CHAT, "training.jsonl, line 2 is no JSON in UTF-8"),
        (CHAT + CHAT[:-3], "training.jsonl, line 2 is no JSON in UTF-8"),
        (b"\xef\xbb\xbf" + CHAT, "line 1 is no JSON in UTF-8 (Unexpected UTF-8 BOM"),
        ('{"messages": "\u00e9"}\n'.encode("latin-1"), "line 1 is no JSON in UTF-8"),
        (CHAT + b'["messages"]\n', "line 2 is no JSON object"),
        (
            CHAT + b'{"input": 1, "output": 2}\n',
            "line 2 has the fields input, output; a row of this recipe needs conversation or",
        ),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: bytes, message: str | None) -> None:
    (tmp_path / "training.jsonl").write_bytes(content)
    if message is None:
        check_rows(tmp_path, CONVERSATIONS)
        return
    with pytest.raises(BridgeError, match=re.escape(message)):
        check_rows(tmp_path, CONVERSATIONS)


def test_validation_may_be_missing_and_is_checked_where_it_is_there(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="must be a directory with training"):
        check_rows(tmp_path)
    (tmp_path / "training.jsonl").write_text('{"input": "a", "output": "b"}\n')
    check_rows(tmp_path, PROMPTS)
    (tmp_path / "validation.jsonl").write_text('{"input": "a"}\n')
    with pytest.raises(BridgeError, match=r"validation\.jsonl, line 1 .* needs output"):
        check_rows(tmp_path, PROMPTS)
    (tmp_path / "validation.jsonl").write_text('{"input": "a", "output": "longer"}\n')
    check_rows(tmp_path, PROMPTS)
