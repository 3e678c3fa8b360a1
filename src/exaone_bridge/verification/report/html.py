"""Renders a report as one HTML file, with the plot inside. No torch is imported."""

from __future__ import annotations

from html import escape

from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.verification.report.plot import activation_plot
from exaone_bridge.verification.report.report import Check, Report, Status

__all__ = ["html_of", "summary_html"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1160px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.sub { color: #59636e; margin: .2rem 0 1.2rem; }
.badge { display: inline-block; padding: .15rem .7rem; border-radius: 1rem; font-weight: 600;
  color: #fff; }
.passed { background: #1a7f37; } .failed { background: #c62828; } .notrun { background: #8a949e; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; color: #59636e; font-weight: 600; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid #e4e7eb; vertical-align: top;
  overflow-wrap: anywhere; }
.details { color: #c62828; }
.box { border-left: 4px solid #c62828; background: #fff5f5; padding: .6rem 1rem; }
svg { width: 100%; height: auto; }
pre { background: #f5f7f9; padding: .7rem 1rem; overflow-x: auto; }
details { margin-top: 1rem; } summary { cursor: pointer; } code { font-size: .85em; }
"""


def html_of(report: Report) -> str:
    """Return the full page."""
    setting = ", ".join(
        (
            f"{report.parameters:,} parameters",
            report.layout,
            report.dtype,
            f"backend {report.backend}",
            f"{report.seconds:.1f} s",
        )
    )
    checks = "".join(map(_check, report.checks))
    command = f"<h2>Command</h2><pre>{escape(report.command)}</pre>" if report.command else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(report.title)}: verification</title><style>{_STYLE}</style></head><body>
<h1>{escape(report.title)} {_badge(report.status)}</h1>
<p class="sub">{escape(setting)}</p>
{_divergence(report)}
<h2>Checks</h2>
<table><tr><th>check</th><th>summary</th><th>threshold</th><th>status</th></tr>
{checks}</table>
{_plot(report)}
{_table("Model", report.model)}
{_table("Setup", {**report.setup, **report.versions})}
{command}
{_activations(report)}
{_tensors(report)}
</body></html>
"""


def summary_html(report: Report) -> str:
    """Return the title and the checks, for a cell of a notebook."""
    rows = "".join(
        f"<tr><td>{escape(check.name)}</td><td>{escape(check.status)}</td>"
        f"<td>{escape(check.summary)}</td><td>{escape(check.details)}</td></tr>"
        for check in report.checks
    )
    head = "<tr><th>check</th><th>status</th><th>summary</th><th>details</th></tr>"
    title = f"{report.title}, {report.layout}, {report.dtype}: {report.status}"
    return f"<p><b>{escape(title)}</b></p><table>{head}{rows}</table>"


def _badge(status: Status) -> str:
    return f'<span class="badge {status.value.replace(" ", "")}">{status.value}</span>'


def _check(check: Check) -> str:
    kind = "sub" if check.passed else "details"
    details = f'<div class="{kind}">{escape(check.details)}</div>' if check.details else ""
    cells = (
        escape(check.name),
        escape(check.summary) + details,
        escape(check.threshold),
        _badge(check.status),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _divergence(report: Report) -> str:
    if report.divergence is None:
        return ""
    causes = "".join(f"<li>{escape(cause)}</li>" for cause in report.divergence.causes)
    text = str(report.divergence)
    sentence = escape(text[0].upper() + text[1:])
    return f'<div class="box"><b>{sentence}.</b> Usual causes:<ul>{causes}</ul></div>'


def _plot(report: Report) -> str:
    if not report.activations:
        return ""
    return f"<h2>Differences of the activations</h2>{activation_plot(report.activations)}"


def _table(title: str, values: JSONMapping) -> str:
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>"
        for key, value in values.items()
    )
    return f"<h2>{title}</h2><table>{rows}</table>" if rows else ""


def _activations(report: Report) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(each.name)}</code></td><td>{escape(each.sublayer)}</td>"
        f"<td>{each.difference:.2e}</td><td>{each.threshold:.2e}</td>"
        f"<td>{_badge(Status.FAILED if each.diverges else Status.PASSED)}</td></tr>"
        for each in report.activations
    )
    head = "<th>activation</th><th>sublayer</th><th>difference</th><th>threshold</th><th></th>"
    return _folded(f"All activations ({len(report.activations)})", head, rows)


def _tensors(report: Report) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td>"
        f"<td>{escape(str(info['dtype']))} {escape(str(info['shape']))}</td>"
        f"<td><code>{escape(str(info['sha256']))}</code></td></tr>"
        for name, info in report.tensors.items()
    )
    head = "<th>tensor</th><th>dtype, shape</th><th>SHA-256</th>"
    return _folded(f"All tensors ({len(report.tensors)})", head, rows)


def _folded(title: str, head: str, rows: str) -> str:
    return f"<details><summary>{title}</summary><table><tr>{head}</tr>{rows}</table></details>"
