"""The check of greedy generation, and the prompts it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from exaone_bridge.verification.checks.generation import (
    Generated,
    compare_generation,
    generate,
)
from exaone_bridge.verification.workflow.transformers import load


def test_generation_is_compared_prompt_by_prompt() -> None:
    before = {
        "plain": Generated((1, 2), (3, 4)),
        "chat": Generated((5,), (6,)),
        "tools": Generated(template_error="no tools"),
    }
    assert compare_generation(before, dict(before)).passed
    assert "tools (rejected by the template)" in compare_generation(before, dict(before)).summary
    faults = {
        "plain: token 1 is 4, then 9": {"plain": Generated((1, 2), (3, 9))},
        "chat: the chat template makes another prompt": {"chat": Generated((7,), (6,))},
        "tools: the chat template makes another prompt": {
            "tools": Generated(template_error="no roles")
        },
    }
    for where, change in faults.items():
        check = compare_generation(before, before | change)
        assert not check.passed and check.details == where
    assert not compare_generation(before, {"plain": before["plain"]}).passed


def test_a_template_may_reject_a_conversation(tiny: Any, other: Path) -> None:
    template = other / "chat_template.jinja"
    template.write_text(
        "{%- if tools %}{{ raise_exception('no tools here') }}{%- endif %}" + template.read_text()
    )
    found = generate(load(other, torch.float32), other, [1, 2, 3])
    assert [name for name, each in found.items() if each.template_error] == [
        "chat, tools",
        "chat, tool called",
    ]
    assert (
        found["chat, tools"].template_error == "no tools here"
        and len(found["chat"].tokens) == len(found["plain"].tokens) == 8
    )
    assert found["chat"].prompt != found["chat, thinking"].prompt


def test_a_folder_without_a_tokenizer_has_one_prompt(tiny: Any, other: Path) -> None:
    for path in [*other.glob("tokenizer*"), *other.glob("chat*")]:
        path.unlink()
    assert list(generate(load(other, torch.float32), other, [1, 2, 3])) == ["plain"]
