"""Chat templates that mark the assistant's text, tokenizers for them, and random conversations.

Each template is written as it would be published and marks by `{% generation %}` what the model
generates, so that Transformers computes the reference mask; `unmarked` removes the marks.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from exaone_bridge.models.ernie45 import tiny as ernie45
from exaone_bridge.models.exaone4 import tiny as exaone4
from exaone_bridge.models.exaone45 import tiny as exaone45
from exaone_bridge.models.exaone_moe import tiny as exaone_moe

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Look up the {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]

# The features of EXAONE 4.0's published template: system prompt and tools in one turn, tool calls
# and results, thinking in the last turn only and only on request, an empty block everywhere else.
EXAONE4_PUBLISHED = """\
{%- set skip_think = skip_think if skip_think is defined else true %}
{%- set heads = {'user': '[|user|]\n', 'assistant': '[|assistant|]\n', 'system': '[|system|]\n',
                 'tool': '[|tool|]\n'} %}
{%- set end = '[|endofturn|]\n' %}
{%- macro describe(tools) %}
    {{- '# Available Tools' }}
    {%- for tool in tools %}{{- '\n<tool>' ~ (tool | tojson) ~ '</tool>' }}{%- endfor %}
{%- endmacro %}
{%- for i in range(messages | length) %}
    {%- set msg = messages[i] %}
    {%- if msg.role not in heads %}{{- raise_exception('Unknown role: ' ~ msg.role) }}{%- endif %}
    {%- if i == 0 and msg.role == 'system' %}
        {{- heads.system ~ msg.content }}
        {%- if tools %}{{- '\n\n' }}{{- describe(tools) }}{%- endif %}
        {{- end -}}
        {%- continue %}
    {%- elif i == 0 and tools %}
        {{- heads.system }}{{- describe(tools) }}{{- end -}}
    {%- endif %}
    {%- if msg.role == 'assistant' %}
        {{- heads.assistant }}
        {%- set reasoning = msg.reasoning_content %}
        {%- set content = msg.content %}
        {%- if content and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].replace('<think>', '').strip() %}
            {%- set content = content.split('</think>')[-1].strip() %}
        {%- endif %}
        {%- if content and reasoning and loop.last and not skip_think %}
            {{- '<think>\n' }}{% generation %}{{- reasoning ~ '\n</think>\n\n' }}
            {{- content }}
            {%- for call in msg.tool_calls or [] %}
                {{- '\n<tool_call>' ~ ({'name': call.function.name,
                    'arguments': call.function.arguments} | tojson) ~ '</tool_call>' }}
            {%- endfor %}
            {{- '[|endofturn|]' }}{% endgeneration %}{{- '\n' }}
        {%- else %}
            {%- if content or msg.tool_calls %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
            {% generation %}{{- content or '' }}
            {%- for call in msg.tool_calls or [] %}
                {{- '\n' if content or not loop.first }}
                {{- '<tool_call>' ~ ({'name': call.function.name,
                    'arguments': call.function.arguments} | tojson) ~ '</tool_call>' }}
            {%- endfor %}
            {{- '[|endofturn|]' }}{% endgeneration %}{{- '\n' }}
        {%- endif %}
    {%- elif msg.role == 'tool' %}
        {%- if i == 0 or messages[i - 1].role != 'tool' %}{{- heads.tool }}{%- endif %}
        {{- '<tool_result>' ~ (msg.content | tojson) ~ '</tool_result>' }}
        {{- end if loop.last or messages[i + 1].role != 'tool' else '\n' }}
    {%- else %}
        {{- heads[msg.role] ~ msg.content ~ end }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- heads.assistant }}
    {{- '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}
{%- endif %}"""

# Thinking by default, kept after the last question, as in K-EXAONE and Qwen3.
EXAONE_MOE_THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for msg in messages %}
    {%- if msg.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for msg in messages %}
    {{- '<|' ~ msg.role ~ '|>\n' }}
    {%- if msg.role == 'assistant' %}
        {{- '<think>\n' }}
        {%- if loop.index0 > ns.last and msg.reasoning_content %}
            {%- generation %}{{- msg.reasoning_content ~ '\n</think>\n\n' }}
            {{- msg.content | trim }}{{- '<|endofturn|>' }}{%- endgeneration %}
        {%- else %}
            {{- '\n</think>\n\n' }}
            {%- generation %}{{- msg.content | trim }}{{- '<|endofturn|>' }}{%- endgeneration %}
        {%- endif %}
    {%- else %}
        {{- msg.content ~ '<|endofturn|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n<think>\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n\n' }}{%- endif %}
{%- endif %}"""


def _marked(template: str, text: str) -> str:
    """Mark `text` of a tiny template where the message is the assistant's."""
    assert text in template
    marked = "{% generation %}" + text + "{% endgeneration %}"
    return template.replace(
        text, "{% if message.role == 'assistant' %}" + marked + "{% else %}" + text + "{% endif %}"
    )


_CONTENT = "{{ message.content }}"
_PARTS = exaone45.CHAT_TEMPLATE[exaone45.CHAT_TEMPLATE.index("{% if message.content is string") :]
_PARTS = _PARTS[: _PARTS.index("[|endofturn|]")]
# name -> marked template, special tokens
TEMPLATES: dict[str, tuple[str, dict[str, int]]] = {
    "exaone4": (
        _marked(exaone4.CHAT_TEMPLATE, _CONTENT + "[|endofturn|]"),
        exaone4.SPECIAL_TOKENS,
    ),
    "exaone45": (
        _marked(exaone45.CHAT_TEMPLATE, _PARTS + "[|endofturn|]"),
        exaone45.SPECIAL_TOKENS,
    ),
    "exaone-moe": (
        _marked(exaone_moe.CHAT_TEMPLATE, _CONTENT + "<|endofturn|>"),
        exaone_moe.SPECIAL_TOKENS,
    ),
    "ernie45": (
        _marked(ernie45.CHAT_TEMPLATE, _CONTENT + "<|end_of_sentence|>"),
        ernie45.SPECIAL_TOKENS,
    ),
    "exaone4-published": (EXAONE4_PUBLISHED, exaone4.SPECIAL_TOKENS),
    "exaone-moe-thinking": (EXAONE_MOE_THINKING, exaone_moe.SPECIAL_TOKENS),
}


def unmarked(template: str) -> str:
    return re.sub(r"\{%-? (end)?generation %\}", "", template)


def tokenizer(name: str) -> Any:
    """Return a BPE tokenizer whose tokens straddle headers, thinking blocks and text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, special = TEMPLATES[name]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    rng = random.Random(1)
    texts = ["<think>\n\n</think>\n\n", "\nan", "\n\nthe", *(_text(rng) for _ in range(50))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator(texts * 3, trainer)
    model.add_special_tokens([AddedToken(text, special=True) for text in special])
    found = PreTrainedTokenizerFast(tokenizer_object=model)
    found.chat_template = unmarked(template)
    return found


_WORDS = ("an", "the", "answer", "한국어", "é", "\n", "\n\n", " ", "  ", "<", "[|", "\U0001f600")
# Strings of the templates themselves, in which nothing may be searched.
_HOSTILE = ("[|assistant|]\n", "[|endofturn|]", "Assistant: ", "<|assistant|>", "<think>\n", "{%")


def _text(rng: random.Random, hostile: bool = False) -> str:
    words = rng.choices(_WORDS, k=rng.randint(1, 8))
    if hostile and rng.random() < 0.3:
        words.insert(rng.randrange(len(words)), rng.choice(_HOSTILE))
    return "".join(words)


def conversations(name: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield random rows: system prompts, several turns, tools and thinking where a template can."""
    rng = random.Random(seed)
    for _ in range(count):
        messages: list[dict[str, Any]] = []
        row: dict[str, Any] = {"messages": messages}
        if name == "exaone4-published" and rng.random() < 0.5:
            row["tools"] = TOOLS
        if name == "exaone4-published" and rng.random() < 0.5:
            row["chat_template_kwargs"] = {"skip_think": False}
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": _text(rng, True)})
        for _ in range(rng.randint(1, 4)):
            messages.append({"role": "user", "content": _text(rng, True)})
            if "tools" in row and rng.random() < 0.6:
                messages += _tool_turns(rng)
            # Not empty, for which Transformers finds no token, and nothing to trim.
            answer = {"role": "assistant", "content": f"a{_text(rng, True)}."}
            if "-" in name and rng.random() < 0.5:
                answer["reasoning_content"] = f"r{_text(rng)}?"
            messages.append(answer)
        if rng.random() < 0.1:
            messages.append({"role": "user", "content": _text(rng)})
        yield row


def _tool_turns(rng: random.Random) -> list[dict[str, Any]]:
    """Return a message of the assistant with one or two calls, and their results."""
    calls = [
        {"type": "function", "function": {"name": name, "arguments": {"city": _text(rng)}}}
        for name in rng.sample(("weather", "time"), rng.randint(1, 2))
    ]
    content = rng.choice((None, "", f"a{_text(rng)}."))
    return [
        {"role": "assistant", "content": content, "tool_calls": calls},
        *({"role": "tool", "content": _text(rng, True)} for _ in calls),
    ]
