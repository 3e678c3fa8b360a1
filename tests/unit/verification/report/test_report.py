"""The report: status, JSON and its schema, HTML with a plot, cards."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exaone_bridge.verification.activations.divergence import CAUSES, first_divergence
from exaone_bridge.verification.activations.probe_points import VISION_PREFIX
from exaone_bridge.verification.report import numbers
from exaone_bridge.verification.report.card import displayed_command, write_card
from exaone_bridge.verification.report.html import html_of
from exaone_bridge.verification.report.plot import activation_plot, plot_image
from exaone_bridge.verification.report.provenance import device, revision
from exaone_bridge.verification.report.report import (
    ActivationDiff,
    Check,
    Report,
    Status,
    versions,
)
from tests.helpers.paths import ROOT

GOOD, BAD = (
    Check("tensors", "91 tensors bitwise equal", True),
    Check("config", "1 of 2 keys differ", False, "a: 1, then 2"),
)
SKIPPED = Check.not_run("generation", "it needs the full model")
LOGITS = Check(
    "logits",
    "max |difference| nan",
    False,
    "here",
    "1e-5",
    {"max": float("nan"), "threshold": 1e-5},
)


def activations(diverging: int | None = None, layers: int = 3) -> tuple[ActivationDiff, ...]:
    """Activations of which those from the number `diverging` on are above the threshold."""
    kinds = ("attention", "norm", "router", "mlp", "layer")
    inner = [
        (f"model.layers.{layer}.{kind}", layer, kind) for layer in range(layers) for kind in kinds
    ]
    names = [("model.embed_tokens", None, "embedding"), *inner, ("logits", None, "output layer")]

    def difference(number: int) -> float:
        if number == 0:
            return 0.0
        return 1e-6 if diverging is None or number < diverging else 0.5

    return tuple(
        ActivationDiff(*name, difference(number), 2e-5) for number, name in enumerate(names)
    )


def report(*checks: Check, diverging: int | None = None, **fields: Any) -> Report:
    found = activations(diverging)
    defaults: dict[str, Any] = {
        "model": {
            "family": "exaone4",
            "parameters": 345920,
            "num_layers": 3,
            "layers": "LLG",
            "dtype": "float32",
        },
        "activations": found,
        "divergence": first_divergence(found),
        "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [64], "sha256": "0" * 64}},
        "versions": versions(),
        "setup": {"prompts": [[3, 65]], "seed": 0},
        "command": "exaone-bridge verify m",
    }
    return Report(source="m", layout="TP1 x PP1", checks=checks, **(defaults | fields))


def schema() -> Any:
    path = files("exaone_bridge.verification.report") / "report.schema.json"
    return json.loads(path.read_text())


def test_a_report_passes_if_a_check_ran_and_none_failed() -> None:
    assert not Report("m", "TP1").passed and not Report("m", "TP1", (SKIPPED,)).passed
    assert Report("m", "TP1", (GOOD, SKIPPED)).passed
    assert Report("m", "TP1", (GOOD,)).failures() == ""
    found = Report("m", "TP1", (GOOD, BAD))
    assert not found.passed and found.failures() == "m: config: 1 of 2 keys differ; a: 1, then 2"
    statuses = [check.status for check in (GOOD, BAD, SKIPPED)]
    assert statuses == [Status.PASSED, Status.FAILED, Status.NOT_RUN]


def test_a_report_is_short_where_it_is_shown(tmp_path: Path) -> None:
    found = report(GOOD, BAD, SKIPPED, other="<n>", diverging=8)
    assert not found and report(GOOD)
    assert repr(found).splitlines() == [
        "m against <n>, TP1 x PP1, float32: failed",
        "  tensors     passed   91 tensors bitwise equal",
        "  config      failed   a: 1, then 2",
        "  generation  not run  it needs the full model",
    ]
    shown = found._repr_html_()
    assert "m against &lt;n&gt;" in shown and "a: 1, then 2" in shown and len(shown) < 5000
    found.write_html(str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html_of(found)


def test_the_round_trip_is_every_check_but_logits_and_gradients() -> None:
    assert Report("m", "TP1", (GOOD, LOGITS)).round_trip_passed
    assert not Report("m", "TP1", (GOOD, BAD)).round_trip_passed


def test_a_report_names_the_divergence_and_its_causes() -> None:
    found = report(GOOD, LOGITS, diverging=8)
    assert found.first_diverging_layer == "1" and found.divergence is not None
    assert found.divergence.sublayer == "router" and "sigmoid" in found.failures()
    assert report(GOOD).first_diverging_layer == "-"
    assert CAUSES.keys() == set(schema()["$defs"]["sublayer"]["enum"])


@pytest.mark.parametrize("diverging", [None, 2])
def test_a_vision_encoder_is_named_without_a_layer(diverging: int | None) -> None:
    """It is executed between the token embeddings and the first layer."""
    kinds = ("embedding", "norm", "attention", "layer", "merger", "features")
    vision = [
        ActivationDiff(
            f"visual.{kind}",
            None,
            VISION_PREFIX + kind,
            0.5 if diverging is not None and number >= diverging else 1e-6,
            2e-5,
        )
        for number, kind in enumerate(kinds)
    ]
    language = activations()
    every = (language[0], *vision, *language[1:])
    found = report(GOOD, LOGITS, activations=every, divergence=first_divergence(every))
    jsonschema.Draft202012Validator(schema()).validate(found.to_dict())
    assert ">vision encoder<" in activation_plot(every)
    assert ">vision encoder<" not in activation_plot(language)
    if diverging is None:
        assert found.divergence is None and found.first_diverging_layer == "-"
        return
    assert str(found.divergence) == "hidden states diverge at vision attention (visual.attention)"
    assert found.first_diverging_layer == "vision attention"
    assert "Hidden states diverge at vision attention (visual.attention)" in html_of(found)


@pytest.mark.parametrize("diverging", [None, 0, 8, 16])
def test_the_json_has_the_form_of_the_schema(diverging: int | None, tmp_path: Path) -> None:
    found = report(GOOD, BAD, SKIPPED, LOGITS, diverging=diverging, other="n", seconds=1.5)
    found.write_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert data == found.to_dict() and data["schema_version"] == 2 and data["status"] == "failed"
    assert data["checks"][3]["metrics"]["max"] is None
    assert (data["divergence"] is None) == (diverging is None)


@pytest.mark.parametrize("field", ["schema_version", "checks", "divergence", "tensors"])
def test_the_schema_rejects_missing_and_unknown_fields(field: str) -> None:
    data = report(GOOD).to_dict()
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(data)
    assert not validator.is_valid({key: value for key, value in data.items() if key != field})
    assert not validator.is_valid(data | {field: 7}) and not validator.is_valid(data | {"new": 1})


def test_the_schema_has_every_field_of_a_report() -> None:
    data = report(GOOD).to_dict()
    assert data.keys() == schema()["properties"].keys() == set(schema()["required"])


def test_the_html_has_everything_and_needs_no_other_file() -> None:
    bad = Check("config", "1 <b> of 2", False, "a & b")
    found = report(GOOD, bad, SKIPPED, diverging=8, other="<other>", folder="/models/m")
    page = html_of(found)
    assert "&lt;other&gt;" in page and "1 &lt;b&gt; of 2" in page and "a &amp; b" in page
    assert "Hidden states diverge at layer 1, router" in page
    assert all(escape(cause) in page for cause in CAUSES["router"])
    assert 'class="badge passed"' in page and 'class="badge failed"' in page
    assert "not run" in page and activation_plot(found.activations) in page
    assert not re.search(r'(src|href)="(?!#)', page) and "prefers-color-scheme: dark" in page


def test_the_html_says_when_where_and_with_what_it_was_made() -> None:
    commit = "0f6c" * 10
    found = report(GOOD, date="2026-03-01T09:05:00+00:00", host="node-7", device="NVIDIA H100")
    found = dataclasses.replace(found, folder="/hub/m", revision=commit, seconds=200.0)
    page = html_of(found)
    for text in ("1 March 2026, 09:05 UTC", "node-7", "NVIDIA H100", "/hub/m", commit):
        assert f"<dd>{text}</dd>" in page
    assert "<dd>3 min 20 s</dd>" in page and "<dd>345,920</dd>" in page
    assert "was converted to Megatron-Core and back without a change" in page
    assert 'href="#reading"' in page and 'id="reading"' in page


def test_the_html_sorts_by_nearness_and_explains_what_it_has() -> None:
    shares = (0.2, 0.9, 3.0, float("nan"), 0.5)
    diffs = [
        ActivationDiff(f"model.layers.{n}", n, "layer", share * 1e-5, 1e-5)
        for n, share in enumerate(shares)
    ]
    metrics = {"relative": 7e-7, "threshold": 1e-5}
    logits = Check("logits", "max |difference| 4.5e-06", True, metrics=metrics)
    page = html_of(report(GOOD, logits, BAD, activations=tuple(diffs), divergence=None))
    checks, _, rest = page.partition("Nearest to the threshold</h2>")
    assert re.findall(r'class="name">(\w+)<', checks) == ["config", "logits", "tensors"]
    assert "max |difference| 4.5 \u00d7 10\u207b\u2076" in checks and "</span>7%" in checks
    assert re.findall(r"<td>layer (\d)", rest) == ["3", "2", "1", "4", "0"]
    meanings = re.findall(r"<dt>([\w ]+)</dt>", rest.partition('id="reading"')[2])
    assert meanings == ["tensors", "config", "logits", "nearness to the threshold"]
    assert "</i>3 within the threshold<" in page and "</i>2 above it<" in page
    passing = html_of(report(GOOD, activations=tuple(diffs[:2]), divergence=None))
    assert "above it<" not in passing and "<dt>logits</dt>" not in passing


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.36, "0.36"),
        (91234.0, "91,000"),
        (4.5e-06, "4.5 \u00d7 10\u207b\u2076"),
        (float("nan"), "NaN"),
        (float("inf"), "infinite"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert numbers.number(value) == text
    assert numbers.readable(f"max {4.5e-06:.1e}, KL {0.74:.1e}") == (
        "max 4.5 \u00d7 10\u207b\u2076, KL 0.74"
    )
    assert [numbers.nearness(share) for share in (0.0, 1e-4, 0.07, 120.0)] == (
        ["0%", "under 1%", "7%", "120 times"]
    )
    assert [numbers.count(each) for each in (345920, 1279391488)] == ["345,920", "1.28 billion"]
    assert [numbers.duration(each) for each in (4.21, 200, 7500)] == (
        ["4.2 s", "3 min 20 s", "2 h 5 min"]
    )


def test_a_downloaded_folder_tells_its_revision(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    local, clone = tmp_path / "local", tmp_path / "clone"
    metadata = local / ".cache" / "huggingface" / "download" / "config.json.metadata"
    for folder in (snapshot, metadata.parent, clone / ".git" / "refs" / "heads"):
        folder.mkdir(parents=True)
    metadata.write_text(f"{commit}\netag\n1.0\n")
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (clone / ".git" / "refs" / "heads" / "main").write_text(f"{commit}\n")
    assert [revision(each) for each in (snapshot, local, clone)] == [commit] * 3
    assert revision(tmp_path) == revision(tmp_path / "missing") == ""
    assert device()


@pytest.mark.parametrize("layers", [1, 3, 80])
@pytest.mark.parametrize("diverging", [None, 3])
def test_the_plot_has_a_mark_for_every_activation(layers: int, diverging: int | None) -> None:
    every = activations(diverging, layers)
    marks = _marks(activation_plot(every))
    above = sum(each.diverges for each in every)
    assert len(marks) == len(every)
    kinds = [mark.attrib["class"] for mark in marks]
    assert kinds.count("above") == above == (0 if diverging is None else len(every) - 3)
    bottom, height = float(marks[0].attrib["cy"]), [float(mark.attrib["cy"]) for mark in marks]
    assert bottom == max(height)  # equal activations are at the bottom
    assert len(_marks(plot_image(every))) == len(every) + (1 if diverging is None else 2)


@pytest.mark.parametrize("value", [0.0, 1e-30, float("nan"), float("inf")])
def test_the_plot_takes_any_number(value: float) -> None:
    for threshold in (1e-5, value):
        diff = ActivationDiff("logits", None, "output layer", value, threshold)
        (mark,) = _marks(activation_plot((diff,)))
        assert 0 < float(mark.attrib["cy"]) < 460
        assert html_of(report(GOOD, activations=(diff,), divergence=None))


def _marks(image: str) -> list[ElementTree.Element]:
    elements = ElementTree.fromstring(image).iter()
    return [element for element in elements if element.tag.endswith("circle")]


def test_a_card_grows_and_a_section_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    write_card(report(GOOD, seconds=1.0), path, name="M-1B", note="A tiny model.")
    first = path.read_text()
    assert "# M-1B" in first and "A tiny model." in first and "`exaone-bridge verify m`" in first
    assert "| tensors | 91 tensors bitwise equal | equal | passed |" in first
    assert "1 verifications" in first
    write_card(report(GOOD, SKIPPED, dtype="bfloat16"), path, name="M-1B")
    assert path.read_text().count("\n## ") == 2 and "it needs the full model" in path.read_text()
    write_card(report(GOOD, BAD, seconds=2.0), path, name="M-1B")
    text = path.read_text()
    assert text.count("\n## ") == 2 and "1 of 2 keys differ" in text
    assert "A tiny model." not in text and "**1 of 2 verifications failed.**" in text


@pytest.mark.parametrize(
    ("command", "displayed"),
    [
        ("exaone-bridge verify /home/me/models/M --tp 2", "exaone-bridge verify ./M --tp 2"),
        ("exaone-bridge verify m ../n/N", "exaone-bridge verify m ./N"),
        (
            "exaone-bridge verify /a/M --card /b/c.md --name M-1B --note 'A note.' --quick",
            "exaone-bridge verify ./M --quick",
        ),
        ("exaone-bridge verify /a/M --json=/b/r.json --report r.html", "exaone-bridge verify ./M"),
    ],
)
def test_a_card_shows_the_command_without_outputs_and_local_paths(
    command: str, displayed: str
) -> None:
    assert displayed_command(command) == displayed


def test_every_published_model_has_a_card_that_passes() -> None:
    paths = (ROOT / "docs").glob("**/cards/[A-Z]*.md")
    cards = {path.stem: path.read_text() for path in paths}
    assert cards.keys() == {
        "EXAONE-4.0-1.2B",
        "EXAONE-4.0-32B",
        "EXAONE-4.5-33B",
        "ERNIE-4.5-0.3B",
        "ERNIE-4.5-21B-A3B",
        "ERNIE-4.5-300B-A47B",
        "K-EXAONE-236B-A23B",
        "K-EXAONE-2.0-750B-A37B",
    }
    for name, text in cards.items():
        assert text.startswith("<!-- Written by `exaone-bridge verify --card`")
        assert f"\n# {name}\n" in text
        sections = text.count("\n## ")
        assert sections >= 4 and text.count(" s: `exaone-bridge verify ./") == sections
        assert "| failed |" not in text and "bfloat16, backend" in text
        assert "TP2" in text or "EP4" in text
        assert not re.search(r"`[^`]* /[^`]*`", text)  # no absolute path in a command
