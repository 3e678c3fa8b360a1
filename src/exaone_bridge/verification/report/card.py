"""Writes model cards (Markdown): what was verified, in which settings, with which results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.verification.report.report import Report

__all__ = ["card_section", "displayed_command", "prompts_of", "write_card"]

_HEAD = (
    "<!-- Written by `exaone-bridge verify --card`. Do not edit: run the commands below again. -->"
)
_OUTPUT_OPTIONS = ("--card", "--name", "--note", "--json", "--report")
_MEDIA = ("images", "videos")


def write_card(report: Report, path: Path, *, name: str, note: str = "") -> None:
    """Write a card, or add the report to one; a report of the same settings is replaced.

    Args:
        name: the model that the card is about.
        note: a sentence for the section, where something stands in for the published weights.
    """
    sections = _sections(path)
    title, text = card_section(report, note)
    sections[title] = text
    path.write_text(f"{_HEAD}\n\n# {name}\n\n{_summary(sections)}\n" + "\n".join(sections.values()))


def _summary(sections: Mapping[str, str]) -> str:
    failed = sum("| failed |" in text for text in sections.values())
    if failed:
        return f"**{failed} of {len(sections)} verifications failed.**\n"
    return (
        f"{len(sections)} verifications; every check that was run passed. The weights are random, "
        "and\nof the shape that each section gives, unless the section says otherwise.\n"
    )


def _sections(path: Path) -> dict[str, str]:
    """Read the sections of an existing card, by title."""
    if not path.is_file():
        return {}
    parts = path.read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def card_section(report: Report, note: str = "") -> tuple[str, str]:
    """Return title and Markdown of one report."""
    title = f"{report.title}, {report.layout}, {report.dtype}, backend {report.backend}"
    if "mtp_num_layers" in report.setup:
        title += ", with multi-token prediction"
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines = [f"## {title}", ""]
    if note:
        lines += [note, ""]
    lines += [
        f"- Shape: {_shape(report.model)}.",
        f"- Prompts: {prompts_of(report)}.",
        f"- Versions: {versions}.",
    ]
    if report.command:
        lines.append(f"- {report.seconds:.0f} s: `{displayed_command(report.command)}`")
    lines += ["", "| check | summary | threshold | status |", "|---|---|---|---|"]
    for check in report.checks:
        summary = check.summary if check.ran else check.details
        summary += f"; {check.details}" if not check.passed else ""
        cells = (check.name, summary, check.threshold, check.status.value)
        lines.append(f"| {' | '.join(cell.replace('|', '\\|') for cell in cells)} |")
    return title, "\n".join(lines) + "\n"


def displayed_command(command: str) -> str:
    """Return a command as a reader types it, without output options and local paths."""
    shown: list[str] = []
    arguments = iter(shlex.split(command))
    for argument in arguments:
        option = argument.partition("=")[0]
        if option in _OUTPUT_OPTIONS:
            if option == argument:
                next(arguments, None)
            continue
        if "/" in argument and not argument.startswith("-"):
            argument = f"./{Path(argument).name}"
        shown.append(argument)
    return shlex.join(shown)


def _shape(model: JSONMapping) -> str:
    text = (
        f"{model.get('parameters', 0):,} parameters in {model.get('dtype')}, "
        f"{model.get('num_layers')} layers `{model.get('layers')}`, "
        f"hidden {model.get('hidden_size')}, heads {model.get('num_heads')}/"
        f"{model.get('num_kv_heads')} x {model.get('head_dim')}, MLP {model.get('ffn_size')}, "
        f"vocabulary {model.get('vocab_size')}, {'tied' if model.get('tied') else 'untied'}"
    )
    if "experts" in model:
        text += (
            f"; {model['experts']} experts, {model['experts_per_token']} per token, "
            f"{model['shared_experts']} shared, MLP {model['expert_ffn_size']}, "
            f"on `{model['mlp_layers']}`"
        )
    if "vision" in model:
        text += f"; {_vision(model['vision'])}"
    if "mtp" in model:
        layers = model["mtp"]["layers"]
        text += (
            f"; multi-token prediction of depth {model['mtp']['depth']}, "
            f"{layers} layer{'s' * (layers > 1)} on disk"
        )
    return text


def _vision(vision: JSONMapping) -> str:
    return (
        f"vision encoder of {vision['depth']} blocks, hidden {vision['hidden_size']}, "
        f"heads {vision['num_heads']}/{vision['num_kv_heads']} x {vision['head_dim']}, "
        f"MLP {vision['ffn_size']}, patches of {vision['patch_size']} pixels, "
        f"windows of {vision['window_size']} pixels, full attention in blocks "
        f"{', '.join(map(str, vision['full_attention']))}"
    )


def prompts_of(report: Report) -> str:
    """Return the prompts of a report in words: 3 of 65 tokens, 1 of 8 tokens with 1 image."""
    shapes = report.setup.get("prompts", [])
    media = [report.setup.get(kind, [0] * len(shapes)) for kind in _MEDIA]
    text = ", ".join(
        f"{count} of {length} tokens{_with([counts[batch] for counts in media])}"
        for batch, (count, length) in enumerate(shapes)
    )
    return (text or "none") + (", layer by layer" if report.setup.get("layer_by_layer") else "")


def _with(counts: Sequence[int]) -> str:
    named = [
        f"{count} {kind if count > 1 else kind.removesuffix('s')}"
        for count, kind in zip(counts, _MEDIA, strict=True)
        if count
    ]
    return f" with {' and '.join(named)}" if named else ""
