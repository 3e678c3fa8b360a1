"""The report: statuses, JSON by its schema, HTML with a plot, cards."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from exaone_bridge.verification.activations.divergence import CAUSES, first_divergence
from exaone_bridge.verification.activations.probe_points import VISION_PREFIX
from exaone_bridge.verification.report.card import write_card
from exaone_bridge.verification.report.html import html_of
from exaone_bridge.verification.report.plot import MARKS, differences_png
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
SKIPPED = Check.not_run("generation", "it needs the whole model")
LOGITS = Check(
    "logits", "max |difference| nan", False, "here", "1e-5", {"max": float("nan"), "bound": 1e-5}
)


def places(first: int | None = None, layers: int = 3) -> tuple[ActivationDiff, ...]:
    kinds = ("attention", "norm", "router", "mlp", "layer")
    inner = [
        (f"model.layers.{layer}.{kind}", layer, kind) for layer in range(layers) for kind in kinds
    ]
    every = [("model.embed_tokens", None, "embedding"), *inner, ("logits", None, "output layer")]
    return tuple(
        ActivationDiff(*each, 0.0 if not at else 1e-6 if first is None or at < first else 0.5, 2e-5)
        for at, each in enumerate(every)
    )


def report(*checks: Check, parts: int | None = None, **more: Any) -> Report:
    found = places(parts)
    model = {
        "family": "exaone4",
        "parameters": 345920,
        "num_layers": 3,
        "layers": "LLG",
        "dtype": "float32",
    }
    tensors = {"model.norm.weight": {"dtype": "F32", "shape": [64], "sha256": "0" * 64}}
    defaults: dict[str, Any] = {
        "model": model,
        "activations": found,
        "divergence": first_divergence(found),
        "tensors": tensors,
    }
    defaults |= {
        "versions": versions(),
        "setup": {"prompts": [[3, 65]], "seed": 0},
        "command": "exaone-bridge verify m",
    }
    return Report(source="m", layout="TP1 x PP1", checks=checks, **(defaults | more))


def schema() -> Any:
    return json.loads(
        (files("exaone_bridge.verification.report") / "report.schema.json").read_text()
    )


def test_a_report_holds_only_if_every_check_that_ran_does() -> None:
    assert (
        not Report("m", "TP1").passed and not Report("m", "TP1", (SKIPPED,)).passed
    )  # nothing was checked
    assert (
        Report("m", "TP1", (GOOD, SKIPPED)).passed and Report("m", "TP1", (GOOD,)).failures() == ""
    )
    found = Report("m", "TP1", (GOOD, BAD))
    assert not found.passed and found.failures() == "m: config: 1 of 2 keys differ; a: 1, then 2"
    assert [check.status for check in (GOOD, BAD, SKIPPED)] == [
        Status.PASSED,
        Status.FAILED,
        Status.NOT_RUN,
    ]


def test_the_round_trip_is_every_check_but_those_of_the_arithmetic() -> None:
    assert (
        Report("m", "TP1", (GOOD, LOGITS)).round_trip_passed
        and not Report("m", "TP1", (GOOD, BAD)).round_trip_passed
    )


def test_a_report_says_where_and_why() -> None:
    found = report(GOOD, LOGITS, parts=8)
    assert found.first_diverging_layer == "1" and found.divergence is not None
    assert found.divergence.sublayer == "router" and "sigmoid" in found.failures()
    assert report(GOOD).first_diverging_layer == "-"
    sublayers = set(schema()["$defs"]["sublayer"]["enum"])
    assert CAUSES.keys() == sublayers and MARKS.keys() == {
        name for name in sublayers if not name.startswith(VISION_PREFIX)
    }


@pytest.mark.parametrize("parts", [None, 2])
def test_a_tower_is_named_without_a_layer(parts: int | None, tmp_path: Path) -> None:
    """Between the embedding of words and the first layer, in the order of the arithmetic."""
    kinds = ("embedding", "norm", "attention", "layer", "merger", "features")
    vision_encoder = [
        ActivationDiff(
            f"visual.{kind}",
            None,
            VISION_PREFIX + kind,
            0.5 if parts is not None and at >= parts else 1e-6,
            2e-5,
        )
        for at, kind in enumerate(kinds)
    ]
    language = places()
    every = (language[0], *vision_encoder, *language[1:])
    found = report(GOOD, LOGITS, activations=every, divergence=first_divergence(every))
    found.write_json(tmp_path / "report.json")
    jsonschema.Draft202012Validator(schema()).validate(
        json.loads((tmp_path / "report.json").read_text())
    )
    unnamed = [
        dataclasses.replace(place, sublayer=place.sublayer.removeprefix(VISION_PREFIX))
        for place in every
    ]
    assert differences_png(every) != differences_png(
        unnamed
    )  # as many places, and no tower below them
    if parts is None:
        assert found.divergence is None and found.first_diverging_layer == "-"
        return
    assert str(found.divergence) == "hidden states diverge at vision attention (visual.attention)"
    assert found.first_diverging_layer == "vision attention"
    assert "Hidden states diverge at vision attention (visual.attention)" in html_of(found)


@pytest.mark.parametrize("parts", [None, 0, 8, 16])
def test_json_is_what_the_schema_says(parts: int | None, tmp_path: Path) -> None:
    found = report(GOOD, BAD, SKIPPED, LOGITS, parts=parts, other="n", seconds=1.5)
    found.write_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert (
        data == found.to_json()
        and data["status"] == "failed"
        and data["checks"][3]["metrics"]["max"] is None
    )
    assert (data["divergence"] is None) == (parts is None)


@pytest.mark.parametrize("field", ["schema_version", "checks", "divergence", "tensors"])
def test_the_schema_refuses_what_is_missing_or_strange(field: str) -> None:
    data = report(GOOD).to_json()
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(data)
    assert not validator.is_valid({key: value for key, value in data.items() if key != field})
    assert not validator.is_valid(data | {field: 7}) and not validator.is_valid(data | {"new": 1})


def test_the_schema_is_of_every_field_that_a_report_has() -> None:
    data = report(GOOD).to_json()
    assert data.keys() == schema()["properties"].keys() == set(schema()["required"])


def test_html_holds_everything_and_needs_no_other_file() -> None:
    found = report(
        GOOD, Check("config", "1 <b> of 2", False, "a & b"), SKIPPED, parts=8, other="<other>"
    )
    page = html_of(found)
    assert "&lt;other&gt;" in page and "1 &lt;b&gt; of 2" in page and "a &amp; b" in page
    assert "Hidden states diverge at layer 1, router" in page and all(
        escape(cause) in page for cause in CAUSES["router"]
    )
    assert (
        page.count('class="badge passed"') > 5
        and 'class="badge failed"' in page
        and "not run" in page
    )
    assert not re.search(r'(src|href)="(?!data:)', page)
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image) == differences_png(found.activations)


def colours(data: bytes) -> dict[tuple[int, int, int], int]:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {colour: count for count, colour in image.getcolors(1 << 24) or ()}


@pytest.mark.parametrize("layers", [1, 3, 80])
def test_the_plot_marks_what_is_beyond_the_bound(layers: int) -> None:
    blue, red = (0x17, 0x69, 0xAA), (0xC6, 0x28, 0x28)
    good, bad = (colours(differences_png(places(first, layers))) for first in (None, 3))
    assert (
        good[blue] > bad[blue] > 0 and bad[red] > 2 * good[red] > 0
    )  # the legend has one red mark


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_the_plot_takes_any_number(value: float) -> None:
    assert differences_png(
        (ActivationDiff("logits", None, "output layer", value, 1e-5),)
    ).startswith(b"\x89PNG")
    assert differences_png(
        (ActivationDiff("logits", None, "output layer", value, value),)
    ).startswith(b"\x89PNG")


def test_a_card_grows_and_a_section_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    write_card(report(GOOD, seconds=1.0), path, name="M-1B", note="In miniature.")
    first = path.read_text()
    assert "# M-1B" in first and "In miniature." in first and "`exaone-bridge verify m`" in first
    assert (
        "| tensors | 91 tensors bitwise equal | equal | passed |" in first
        and "1 verifications" in first
    )
    write_card(report(GOOD, SKIPPED, dtype="bfloat16"), path, name="M-1B")
    assert path.read_text().count("\n## ") == 2 and "it needs the whole model" in path.read_text()
    write_card(report(GOOD, BAD, seconds=2.0), path, name="M-1B")
    text = path.read_text()
    assert text.count("\n## ") == 2 and "1 of 2 keys differ" in text and "In miniature." not in text
    assert "**1 of 2 verifications failed.**" in text


def test_every_published_configuration_has_a_card_that_holds() -> None:
    folder = ROOT / "docs" / "cards"
    cards = {path.stem: path.read_text() for path in folder.glob("*.md")}
    exaone = ("EXAONE-4.0-1.2B", "EXAONE-4.0-32B", "EXAONE-4.5-33B")
    names = (*exaone, "ERNIE-4.5-0.3B", "ERNIE-4.5-21B-A3B", "ERNIE-4.5-300B-A47B")
    assert cards.keys() == set(names)
    for name, text in cards.items():
        assert (
            text.startswith("<!-- Written by `exaone-bridge verify --card`")
            and f"\n# {name}\n" in text
        )
        assert text.count("\n## ") >= 4 and text.count(" s: `exaone-bridge verify ") == text.count(
            "\n## "
        )
        assert (
            "| failed |" not in text
            and "bfloat16, backend" in text
            and ("TP2" in text or "EP4" in text)
        )
