"""Greedy generation by Transformers: the same words before and after a round trip, through the chat template too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.schema.hf_files import has_tokenizer
from exaone_bridge.verification.report.report import Check

__all__ = ["Generated", "compare_generation", "generate"]

NEW_TOKENS = 8

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
_QUESTION = {"role": "user", "content": "What is the weather in Seoul? 서울 날씨는?"}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Seoul"}}}
    ],
}
_ANSWER = {"role": "tool", "name": "weather", "content": '{"degrees": 21}'}

CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "chat": ([_QUESTION], {"enable_thinking": False}),
    "chat, thinking": ([_QUESTION], {"enable_thinking": True}),
    "chat, tools": ([_QUESTION], {"enable_thinking": False, "tools": _TOOLS}),
    "chat, tool called": ([_QUESTION, _CALL, _ANSWER], {"enable_thinking": False, "tools": _TOOLS}),
}


@dataclass(frozen=True, slots=True)
class Generated:
    """Words in and words out of one prompt; `refused`: what the chat template said instead."""

    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    template_error: str = ""


def _chats(folder: Path) -> dict[str, Generated]:
    """What tokenizer and chat template make of each conversation; nothing where there are none."""
    if not has_tokenizer(folder):
        return {}
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        return {}
    found = {}
    for name, (messages, settings) in CHATS.items():
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **settings
            )
            found[name] = Generated(tuple(tokenizer(text, add_special_tokens=False).input_ids))
        except TemplateError as error:
            found[name] = Generated(template_error=str(error))
    return found


def generate(model: Any, folder: Path, words: list[int]) -> dict[str, Generated]:
    """Greedy continuations of `words` and, where the folder has a chat template, of conversations through it.

    Args:
        model: Transformers' model of this folder.
        words: a prompt that needs no tokenizer.
    """
    import torch

    found = {"plain": Generated(tuple(words))} | _chats(folder)
    for name, prompt in found.items():
        if not prompt.prompt:
            continue
        tokens = torch.tensor([prompt.prompt], device=model.device)
        with torch.no_grad():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        found[name] = Generated(prompt.prompt, tuple(output[0, tokens.shape[1] :].tolist()))
    return found


def compare_generation(before: Mapping[str, Generated], after: Mapping[str, Generated]) -> Check:
    """The same prompts and the same words, conversation by conversation."""
    faults = []
    for name in dict.fromkeys((*before, *after)):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            faults.append(f"{name}: only one side has it")
        elif (a.prompt, a.template_error) != (b.prompt, b.template_error):
            faults.append(f"{name}: the template makes another prompt")
        elif a.tokens != b.tokens:
            first = next(
                at
                for at, pair in enumerate(zip(a.tokens, b.tokens, strict=True))
                if pair[0] != pair[1]
            )
            faults.append(f"{name}: word {first} is {a.tokens[first]}, then {b.tokens[first]}")
    names = ", ".join(
        f"{name} (refused by the template)" if each.template_error else name
        for name, each in before.items()
    )
    count = sum(len(each.tokens) for each in before.values())
    figure = f"{count} greedy words, {len(before)} prompts: {names}"
    if faults:
        figure = f"{len(faults)} of {len(before)} prompts differ"
    values = {"prompts": list(before), "words": count, "differing": len(faults)}
    return Check("generation", figure, not faults, "; ".join(faults), metrics=values)
