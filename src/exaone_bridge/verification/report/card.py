"""Model cards: what was verified, at which layouts and precisions, with which figures. Written from reports alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exaone_bridge.verification.report.report import Report

__all__ = ["card_section", "write_card"]

_HEAD = (
    "<!-- Written by `exaone-bridge verify --card`. Do not edit: run the commands below again. -->"
)


def write_card(report: Report, path: Path, *, name: str, note: str = "") -> None:
    """Write a card, or add this report to one; a run of the same command takes the place of its last.

    Args:
        name: what the card is about.
        note: what was verified in place of what, where it was not the published weights themselves.
    """
    sections = _sections(path)
    key, text = card_section(report, note)
    sections[key] = text
    body = "\n".join(sections[title] for title in sections)
    path.write_text(f"{_HEAD}\n\n# {name}\n\n{_summary(sections)}\n{body}")


def _summary(sections: dict[str, str]) -> str:
    failed = [title for title, text in sections.items() if "| failed |" in text]
    if failed:
        return f"**{len(failed)} of {len(sections)} verifications failed.**\n"
    return (
        f"{len(sections)} verifications, and every check that ran holds. None of them is of the published weights\n"
        + (
            "themselves unless its section says so: weights are random, of the shape that the section gives.\n"
        )
    )


def _sections(path: Path) -> dict[str, str]:
    """Title -> text of what is there already."""
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    for part in path.read_text().split("\n## ")[1:]:
        found[part.partition("\n")[0]] = f"## {part.rstrip()}\n"
    return found


def card_section(report: Report, note: str = "") -> tuple[str, str]:
    """Title and Markdown of one report."""
    subject = report.source if report.other is None else f"{report.source} against {report.other}"
    title = f"{subject}, {report.layout}, {report.dtype}, backend {report.backend}"
    if report.setup.get("built"):
        title += ", with multi-token prediction"
    model = report.model
    shape = (
        f"{model.get('parameters', 0):,} parameters in {model.get('dtype')}, {model.get('num_layers')} layers "
        f"`{model.get('layers')}`, hidden {model.get('hidden_size')}, heads {model.get('num_heads')}/"
        f"{model.get('num_kv_heads')} x {model.get('head_dim')}, feed-forward {model.get('ffn_size')}, vocabulary "
        f"{model.get('vocab_size')}, {'tied' if model.get('tied') else 'untied'}"
    )
    if "experts" in model:
        shape += (
            f"; experts {model['experts']}, {model['experts_per_token']} a token, {model['shared_experts']} shared, "
            f"each {model['expert_ffn_size']} wide, on `{model['feed_forward']}`"
        )
    shape += "".join(f"; {_WORDS[name](model[name])}" for name in _WORDS if name in model)
    lines = [f"## {title}", ""]
    if note:
        lines += [note, ""]
    lines += [
        f"- Shape: {shape}.",
        f"- Prompts: {_prompts(report)}.",
        f"- Versions: {_versions(report)}.",
    ]
    lines += [f"- {report.seconds:.0f} s: `{report.command}`", ""] if report.command else [""]
    lines += ["| check | summary | threshold | status |", "|---|---|---|---|"]
    for check in report.checks:
        figure = check.summary if check.ran else check.details
        figure += f"; {check.details}" if not check.passed else ""
        lines.append(
            f"| {check.name} | {_cell(figure)} | {_cell(check.threshold)} | {check.status.value} |"
        )
    return title, "\n".join(lines) + "\n"


def _vision_encoder(vision: Mapping[str, Any]) -> str:
    return (
        f"vision tower of {vision['depth']} blocks, hidden {vision['hidden_size']}, heads {vision['num_heads']}/"
        f"{vision['num_kv_heads']} x {vision['head_dim']}, feed-forward {vision['ffn_size']}, patches of "
        f"{vision['patch_size']} pixels, windows of {vision['window_size']}, full attention at "
        f"{', '.join(map(str, vision['full_attention']))}"
    )


def _mtp(mtp: Mapping[str, Any]) -> str:
    return f"multi-token prediction {mtp['depth']} further, {mtp['layers']} layer{'s' * (mtp['layers'] > 1)} on disk"


_WORDS = {"vision": _vision_encoder, "mtp": _mtp}


def _prompts(report: Report) -> str:
    shapes = report.setup.get("prompts", [])
    counts = [
        [report.setup.get(kind, [0] * len(shapes))[number] for kind in _KINDS]
        for number in range(len(shapes))
    ]
    text = ", ".join(
        f"{count} of {length} positions{_with(pictures)}"
        for (count, length), pictures in zip(shapes, counts, strict=True)
    )
    return text + (", a layer at a time on both sides" if report.setup.get("streaming") else "")


_KINDS = ("images", "videos")


def _with(counts: Sequence[int]) -> str:
    said = [
        f"{count} {kind[: None if count > 1 else -1]}"
        for count, kind in zip(counts, _KINDS, strict=True)
        if count
    ]
    return f" with {' and '.join(said)}" if said else ""


def _versions(report: Report) -> str:
    return ", ".join(f"{name} {number}" for name, number in report.versions.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
