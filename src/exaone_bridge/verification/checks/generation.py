"""Compares greedy generation by Transformers before and after a round trip.

Prompts are plain tokens and, if the folder has a chat template, conversations through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exaone_bridge.schema.hf_files import has_tokenizer, tokenizer_needs_code
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.verification.report.report import Check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

CHATS: dict[str, tuple[list[JSONObject], JSONObject]] = {
    "chat": ([_QUESTION], {"enable_thinking": False}),
    "chat, thinking": ([_QUESTION], {"enable_thinking": True}),
    "chat, tools": ([_QUESTION], {"enable_thinking": False, "tools": _TOOLS}),
    "chat, tool called": ([_QUESTION, _CALL, _ANSWER], {"enable_thinking": False, "tools": _TOOLS}),
}


@dataclass(frozen=True, slots=True)
class Generated:
    """One prompt and its continuation, both as token ids.

    Attributes:
        template_error: the error of the chat template, if it rejected the conversation.
        skipped: whether the tokenizer needs remote code, which is not run.
    """

    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    template_error: str = ""
    skipped: bool = False


def _conversations(folder: Path) -> dict[str, Generated]:
    """Return the prompts that tokenizer and chat template make; none if the folder lacks either."""
    if not has_tokenizer(folder):
        return {}
    if tokenizer_needs_code(folder):
        return dict.fromkeys(CHATS, Generated(skipped=True))
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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


def generate(
    model: PreTrainedModel, folder: Path, plain_prompt: Sequence[int]
) -> dict[str, Generated]:
    """Continue the plain prompt, and conversations through the folder's chat template.

    Args:
        model: Transformers' model of this folder.
        plain_prompt: token ids; this prompt needs no tokenizer.

    Returns:
        Name of the prompt -> the prompt and `NEW_TOKENS` greedy tokens.
    """
    import torch

    found = {"plain": Generated(tuple(plain_prompt))} | _conversations(folder)
    for name, each in found.items():
        if not each.prompt:
            continue
        tokens = torch.tensor([each.prompt], device=model.device)
        with torch.no_grad():
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        found[name] = Generated(each.prompt, tuple(output[0, tokens.shape[1] :].tolist()))
    return found


def compare_generation(before: Mapping[str, Generated], after: Mapping[str, Generated]) -> Check:
    """Check that prompts and generated tokens are the same, prompt by prompt."""
    differences = []
    for name in dict.fromkeys((*before, *after)):
        a, b = before.get(name), after.get(name)
        if a is None or b is None:
            differences.append(f"{name}: only one model has this prompt")
        elif (a.prompt, a.template_error) != (b.prompt, b.template_error):
            differences.append(f"{name}: the chat template makes another prompt")
        elif a.tokens != b.tokens:
            pairs = enumerate(zip(a.tokens, b.tokens, strict=True))
            at, (first, second) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
            differences.append(f"{name}: token {at} is {first}, then {second}")
    names = ", ".join(
        f"{name} (not run: the tokenizer needs remote code)"
        if each.skipped
        else f"{name} (rejected by the template)"
        if each.template_error
        else name
        for name, each in before.items()
    )
    count = sum(len(each.tokens) for each in before.values())
    summary = (
        f"{len(differences)} of {len(before)} prompts differ"
        if differences
        else f"{count} greedy tokens, {len(before)} prompts: {names}"
    )
    metrics = {"prompts": list(before), "tokens": count, "differing": len(differences)}
    return Check("generation", summary, not differences, "; ".join(differences), metrics=metrics)
