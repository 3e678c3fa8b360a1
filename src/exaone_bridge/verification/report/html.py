"""Renders a report as one HTML file, with the plot inside. No torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files

from exaone_bridge.schema.size_text import size_text
from exaone_bridge.verification.report.card import prompts_of
from exaone_bridge.verification.report.numbers import (
    TIMES,
    count,
    duration,
    nearness,
    number,
    readable,
)
from exaone_bridge.verification.report.plot import activation_plot, legend
from exaone_bridge.verification.report.report import ActivationDiff, Check, Report, Status

__all__ = ["html_of", "summary_html"]

_NEAREST = 10  # activations that are shown unfolded
# What each check compares; docs/verification.md says it at length.
_MEANINGS = {
    "tensors": "The names, dtypes, shapes and SHA-256 digests of all tensors must be equal.",
    "config": "All keys and values of config.json must be equal.",
    "files": "Tokenizer, chat template and generation config must have equal bytes.",
    "generation": "Greedy generation by Transformers must give the same tokens.",
    "logits": "The logits of both models must agree at every token as well as two correct programs "
    "do that sum in different orders. The threshold is measured on this model.",
    "gradients": "The gradients of one training step must agree in the same sense.",
}
_NO_REVISION = "unknown: the folder does not tell"
_NEARNESS = (
    "Nearness is the difference divided by the threshold: below 100% rounding explains it, above "
    "100% it does not, and the models compute different things."
)
_PLOT = (
    "Each dot is the output of a module, in the order of execution. Its height is the largest "
    "difference between the two models at any token, relative to the largest entry of that token."
)


def html_of(report: Report) -> str:
    """Return the full page."""
    style, script = _resource("report.css"), _resource("report.js")
    sections = (
        _facts(_where(report)),
        "".join(f'<p class="soft">{escape(note)}</p>' for note in report.notes),
        _divergence(report),
        _checks(report),
        _plot(report),
        _nearest(report),
        "<h2>Model</h2>" + _facts(_model(report)),
        "<h2>Settings and versions</h2>" + _facts(_settings(report)),
        f"<h2>Command</h2><pre>{escape(report.command)}</pre>" if report.command else "",
        _tensors(report),
        _meanings(report),
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}: verification {report.status}</title>
<style>{style}</style></head><body>
<h1>{escape(report.title)} {_badge(report.status)}</h1>
<p class="lead">{escape(_lead(report))} <a href="#reading">How to read this report</a></p>
{"\n".join(section for section in sections if section)}
<script>{script}</script></body></html>
"""


def summary_html(report: Report) -> str:
    """Return the title and the checks, for a cell of a notebook."""
    rows = "".join(
        f"<tr><td>{escape(check.name)}</td><td>{escape(check.status)}</td>"
        f"<td>{escape(readable(check.summary))}</td><td>{escape(check.details)}</td></tr>"
        for check in report.checks
    )
    head = "<tr><th>check</th><th>status</th><th>summary</th><th>details</th></tr>"
    title = f"{report.title}, {report.layout}, {report.dtype}: {report.status}"
    return f"<p><b>{escape(title)}</b></p><table>{head}{rows}</table>"


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _lead(report: Report) -> str:
    """Return the result in one sentence, for a reader who does not know the checks."""
    ran = [check for check in report.checks if check.ran]
    computed = any(check.name == "logits" for check in ran)
    if not report.passed:
        failed = [check.name for check in ran if not check.passed]
        what = f"{len(failed)} of {len(ran)} checks failed ({', '.join(failed)})"
        where = "" if report.divergence is None else f"; {report.divergence}"
        if not ran:
            what = "No check was run"
        if report.other is None:
            return f"{report.source}, converted to Megatron-Core and back: {what}{where}."
        return f"{report.source} and {report.other} differ: {what}{where}."
    same = "compute the same to within rounding" if computed else "were not run"
    if report.other is None:
        return (
            f"{report.source} was converted to Megatron-Core and back without a change of its "
            f"files, and Megatron-Core and Transformers {same}."
        )
    return f"{report.source} and {report.other} are equal on disk, and {same}."


def _where(report: Report) -> list[tuple[str, str]]:
    pairs = [
        ("Date", _date(report.date)),
        ("Duration", duration(report.seconds)),
        ("Host", report.host),
        ("Device", report.device),
        ("Parallel layout", report.layout),
        ("Precision", report.dtype),
        ("Backend", report.backend),
        ("Parameters", count(report.parameters)),
        ("Folder", report.folder),
        ("Revision", report.revision or _NO_REVISION),
    ]
    if report.other is not None:
        pairs += [
            ("Other folder", report.other_folder),
            ("Other revision", report.other_revision or _NO_REVISION),
        ]
    return pairs


def _date(date: str) -> str:
    if not date:
        return ""
    when = datetime.fromisoformat(date)
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname()}"


def _model(report: Report) -> list[tuple[str, str]]:
    model = report.model
    if "num_heads" not in model:  # a report that was read or made elsewhere
        return [(name, str(value)) for name, value in model.items()]
    heads = f"{model['num_heads']} query, {model['num_kv_heads']} KV, {model['head_dim']} wide"
    pairs = [
        ("Family", str(model["family"])),
        ("Weights", f"{model['dtype']}, {size_text(model['bytes'])}"),
        ("Layers", f"{model['num_layers']}"),
        ("Hidden size", f"{model['hidden_size']:,}"),
        ("MLP size", f"{model['ffn_size']:,}"),
        ("Attention heads", heads),
        ("Vocabulary", f"{model['vocab_size']:,}, {'tied' if model['tied'] else 'untied'}"),
        ("Attention (L sliding-window, G full)", str(model["layers"])),
        ("RoPE (R applied, - none)", str(model["rope"])),
        ("Sliding window", f"{model['window']:,} tokens" if model["window"] else "none"),
    ]
    if "experts" in model:
        experts = f"{model['experts']}, {model['experts_per_token']} per token"
        pairs += [
            ("Experts", f"{experts}, {model['shared_experts']} shared"),
            ("MLP of an expert", f"{model['expert_ffn_size']:,}"),
            ("MLP (D dense, E experts)", str(model["mlp_layers"])),
        ]
    if "vision" in model:
        vision = model["vision"]
        pairs.append(("Vision encoder", f"{vision['depth']} blocks of {vision['hidden_size']:,}"))
    if "mtp" in model:
        pairs.append(("Multi-token prediction", f"depth {model['mtp']['depth']}"))
    return pairs


def _settings(report: Report) -> list[tuple[str, str]]:
    known = ("prompts", "seed", "layer_by_layer", "images", "videos")
    pairs = [("Prompts", prompts_of(report)), ("Seed", str(report.setup.get("seed", "-")))]
    pairs += [(name, str(value)) for name, value in report.setup.items() if name not in known]
    return pairs + list(report.versions.items())


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a grid; long values take a row of their own."""
    cells = (
        f"<div{' class=wide' if len(value) > 34 else ''}><dt>{escape(name)}</dt>"
        f"<dd>{escape(value)}</dd></div>"
        for name, value in pairs
        if value
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _badge(status: Status) -> str:
    return f'<span class="badge {status.value.replace(" ", "")}">{status.value}</span>'


def _meter(share: float) -> str:
    """Return how near a difference is to its threshold, as a bar and in words."""
    over = not share <= 1
    width = 100 if over else max(share * 100, 1)
    return (
        f'<span class="meter{" over" if over else ""}"><i style="width:{width:.0f}%"></i></span>'
        f"{escape(nearness(share))}"
    )


def _checks(report: Report) -> str:
    def order(check: Check) -> tuple[bool, bool, float]:
        share = _share(check)
        return check.passed, not check.ran, -math.inf if math.isnan(share) else -share

    rows = "".join(map(_check, sorted(report.checks, key=order)))
    head = "<th>Check</th><th>Status</th><th>Result</th><th>Nearness to the threshold</th>"
    return f"<h2>Checks</h2>{_table_of(head, rows)}"


def _share(check: Check) -> float:
    """Return how near a check is to its threshold; 0 if it is a comparison for equality."""
    relative, threshold = check.metrics.get("relative"), check.metrics.get("threshold")
    if not check.ran or not relative or not threshold or "Transformers'" in check.threshold:
        return 0.0
    return float(relative) / float(threshold)


def _check(check: Check) -> str:
    details = check.details and f'<div class="{"soft" if check.passed else "bad"}">{{}}</div>'
    result = escape(readable(check.summary)) if check.ran else ""
    share = _share(check)
    threshold = escape(readable(check.threshold)) if check.ran else ""
    return (
        f'<tr><td class="name">{escape(check.name)}</td>'
        f'<td class="status">{_badge(check.status)}</td>'
        f"<td>{result}{details.format(escape(readable(check.details)))}</td>"
        f'<td data-label="{"nearness" if share else "threshold"}">'
        f"{_meter(share) if share else threshold}</td></tr>\n"
    )


def _table_of(head: str, rows: str) -> str:
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _divergence(report: Report) -> str:
    if report.divergence is None:
        return ""
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in report.divergence.causes)
    text = str(report.divergence)
    sentence = escape(text[0].upper() + text[1:])
    return (
        f'<h2>First difference</h2><div class="alarm"><b>{sentence}.</b> Usual causes:'
        f"<ul>{causes}</ul></div>"
    )


def _plot(report: Report) -> str:
    if not report.activations:
        return ""
    entries = "".join(
        f'<li class="{kind}"><i></i>{escape(text)}</li>'
        for kind, text in legend(report.activations)
    )
    return (
        f'<h2>Differences of the activations</h2><p class="soft">{_PLOT}</p>'
        f'<div class="frame">{activation_plot(report.activations)}<div id="value"></div></div>'
        f'<ul class="legend">{entries}</ul>'
    )


def _nearest(report: Report) -> str:
    if not report.activations:
        return ""
    order = sorted(report.activations, key=ActivationDiff.nearness_key)
    shown, rest = order[:_NEAREST], order[_NEAREST:]
    folded = (
        f"<details><summary>The other {len(rest)} activations</summary>{_activations(rest)}"
        "</details>"
        if rest
        else ""
    )
    return f"<h2>Nearest to the threshold</h2>{_activations(shown)}{folded}"


def _activations(activations: Sequence[ActivationDiff]) -> str:
    rows = "".join(
        f'<tr><td>{_place(each)}<br><code class="soft">{escape(each.name)}</code></td>'
        f'<td class="figure">{_meter(each.share)}</td>'
        f'<td class="figure" data-label="difference">{number(each.difference)}</td>'
        f'<td class="figure" data-label="threshold">{number(each.threshold)}</td></tr>\n'
        for each in activations
    )
    head = "<th>Activation</th><th>Nearness</th><th>Difference</th><th>Threshold</th>"
    return _table_of(head, rows)


def _place(each: ActivationDiff) -> str:
    return escape(each.sublayer if each.layer is None else f"layer {each.layer}, {each.sublayer}")


def _tensors(report: Report) -> str:
    if not report.tensors:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td>"
        f"<td>{escape(str(info['dtype']))}, {f' {TIMES} '.join(map(str, info['shape']))}</td>"
        f'<td><code class="soft">{escape(str(info["sha256"]))}</code></td></tr>\n'
        for name, info in report.tensors.items()
    )
    head = "<th>Tensor</th><th>Dtype, shape</th><th>SHA-256</th>"
    return (
        f"<details><summary>All {len(report.tensors):,} tensors</summary>{_table_of(head, rows)}"
        "</details>"
    )


def _meanings(report: Report) -> str:
    """Explain what this report has, and nothing else."""
    names = [check.name for check in report.checks]
    entries = [(name, text) for name, text in _MEANINGS.items() if name in names]
    if report.activations:
        entries.append(("nearness to the threshold", _NEARNESS))
    if any(not check.ran for check in report.checks):
        entries.append(("not run", "There was nothing to compare; the check says why."))
    cells = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in entries)
    return (
        f'<h2 id="reading">How to read this report</h2><p>exaone-bridge converts models between '
        "Hugging Face and Megatron-Core, and this report compares "
        f"{'two models' if report.other else 'a model before and after'}. It passed if every check "
        f'that was run did.</p><dl class="meanings">{cells}</dl>'
    )
