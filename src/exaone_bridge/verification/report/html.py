"""A report as one HTML file, the plot inside it. No torch."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from exaone_bridge.verification.report.plot import differences_png
from exaone_bridge.verification.report.report import Report

__all__ = ["html_of", "write_html"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.sub { color: #59636e; margin: .2rem 0 1.2rem; }
.badge { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; font-weight: 600; color: #fff; }
.passed { background: #1a7f37; } .failed { background: #c62828; } .notrun { background: #8a949e; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; color: #59636e; font-weight: 600; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid #e4e7eb; vertical-align: top; overflow-wrap: anywhere; }
.where { color: #c62828; } .box { border-left: 4px solid #c62828; background: #fff5f5; padding: .6rem 1rem; }
img { width: 100%; height: auto; } pre { background: #f5f7f9; padding: .7rem 1rem; overflow-x: auto; }
details { margin-top: 1rem; } summary { cursor: pointer; } code { font-size: .85em; }
"""


def write_html(report: Report, path: Path) -> None:
    """One file that needs no other."""
    path.write_text(html_of(report), encoding="utf-8")


def html_of(report: Report) -> str:
    """The whole page."""
    title = report.source if report.other is None else f"{report.source} against {report.other}"
    model_config = [
        f"{report.parameters:,} parameters",
        report.layout,
        report.dtype,
        f"backend {report.backend}",
    ]
    model_config.append(f"{report.seconds:.1f} s")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}: verification</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)} {_badge(report.status.value)}</h1>
<p class="sub">{escape(", ".join(model_config))}</p>
{_location(report)}
<h2>Checks</h2>
<table><tr><th>check</th><th>summary</th><th>threshold</th><th>status</th></tr>
{"".join(map(_check, report.checks))}</table>
{_plot(report)}
{_table("Model", report.model)}
{_table("Setup", {**report.setup, **report.versions})}
{f"<h2>Command</h2><pre>{escape(report.command)}</pre>" if report.command else ""}
{_places(report)}
{_tensors(report)}
</body></html>
"""


def _badge(verdict: str) -> str:
    return f'<span class="badge {verdict.replace(" ", "")}">{verdict}</span>'


def _check(check: Any) -> str:
    kind = "where" if not check.passed else "sub"
    where = f'<div class="{kind}">{escape(check.details)}</div>' if check.details else ""
    cells = (
        escape(check.name),
        escape(check.summary) + where,
        escape(check.threshold),
        _badge(check.status.value),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _location(report: Report) -> str:
    if report.divergence is None:
        return ""
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in report.divergence.causes)
    where = str(report.divergence)
    sentence = escape(where[0].upper() + where[1:])
    return f'<div class="box"><b>{sentence}.</b> What usually causes that:<ul>{causes}</ul></div>'


def _plot(report: Report) -> str:
    if not report.activations:
        return ""
    data = base64.b64encode(differences_png(report.activations)).decode()
    return (
        "<h2>Where the difference comes from</h2>"
        f'<img alt="relative difference at each place of the arithmetic" src="data:image/png;base64,{data}">'
    )


def _table(title: str, values: Any) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items()
    )
    return f"<h2>{title}</h2><table>{rows}</table>" if rows else ""


def _places(report: Report) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(place.name)}</code></td><td>{escape(place.sublayer)}</td><td>{place.difference:.2e}</td>"
        f"<td>{place.threshold:.2e}</td><td>{_badge('failed' if place.diverges else 'passed')}</td></tr>"
        for place in report.activations
    )
    head = "<tr><th>activation</th><th>sublayer</th><th>difference</th><th>threshold</th><th></th></tr>"
    return f"<details><summary>Every place ({len(report.activations)})</summary><table>{head}{rows}</table></details>"


def _tensors(report: Report) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(str(info['dtype']))} {escape(str(info['shape']))}</td>"
        f"<td><code>{escape(str(info['sha256']))}</code></td></tr>"
        for name, info in report.tensors.items()
    )
    head = "<tr><th>tensor</th><th>type, shape</th><th>SHA-256</th></tr>"
    return f"<details><summary>Every tensor ({len(report.tensors)})</summary><table>{head}{rows}</table></details>"
