"""The HTML report in a browser: three widths, light and dark, values under the pointer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from exaone_bridge.verification.activations.divergence import first_divergence
from exaone_bridge.verification.report.report import ActivationDiff, Check, Report
from tests.helpers.browser import CHROMIUM, Page, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
COMMIT = "0f6c7d1a" * 5
OVERFLOWING = """[...document.body.querySelectorAll("*")].filter((each) => {
  const box = each.getBoundingClientRect();
  return box.right > innerWidth + 1 || box.left < -1;
}).map((each) => each.outerHTML.slice(0, 80))"""
# The middle of a dot, and the names of the texts of the plot that overlap another one.
DOT = """(() => { const dot = document.querySelectorAll(".plot circle")[20];
  dot.scrollIntoView({block: "center"}); const box = dot.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
OVERLAPPING = """(() => { const texts = [...document.querySelectorAll(".plot text")];
  const boxes = texts.map((each) => each.getBoundingClientRect());
  return texts.filter((_, i) => boxes.some((other, j) => i < j && boxes[i].left < other.right &&
    other.left < boxes[i].right && boxes[i].top < other.bottom && other.top < boxes[i].bottom))
    .map((each) => each.textContent); })()"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A failing report of 30 layers, with long names."""
    names = [
        (f"model.language_model.layers.{layer}.post_attention_layernorm", layer, kind)
        for layer in range(30)
        for kind in ("attention", "norm", "mlp", "layer")
    ]
    diffs = tuple(
        ActivationDiff(*name, 3e-6 if number < 40 else 0.5, 2e-5)
        for number, name in enumerate(names)
    )
    metrics = {"relative": 0.5, "threshold": 2e-5}
    folder = f"/models/hub/models--LGAI-EXAONE--EXAONE-4.0-32B/snapshots/{COMMIT}"
    report = Report(
        "EXAONE-4.0-32B",
        "TP8 x PP2 + SP",
        (
            Check("tensors", "707 tensors bitwise equal", True),
            Check("logits", "max |difference| 3.6e+00", False, "here", metrics=metrics),
        ),
        activations=diffs,
        divergence=first_divergence(diffs),
        date="2026-03-01T09:05:00+09:00",
        folder=folder,
        revision=COMMIT,
        tensors={names[0][0]: {"dtype": "BF16", "shape": [5120], "sha256": "0" * 64}},
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write_html(path)
    return path


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_cut_at_any_width(page: Page, file: Path, width: int, tmp_path: Path) -> None:
    images = []
    for dark in (False, True):
        page.open(file, width, dark=dark)
        page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
        assert page.evaluate("innerWidth") == width
        assert page.evaluate(OVERFLOWING) == [] and page.evaluate(OVERLAPPING) == []
        images.append(page.screenshot(tmp_path / f"{width}-{dark}.png"))
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert images[0] != images[1] and min(map(len, images)) > 20_000


@pytest.mark.parametrize("width", [390, 1280])
def test_the_pointer_shows_the_values(page: Page, file: Path, width: int) -> None:
    page.open(file, width)
    value = "document.getElementById('value')"
    assert page.evaluate(f"getComputedStyle({value}).visibility") == "hidden"
    page.hover(*page.evaluate(DOT))
    assert page.evaluate(f"getComputedStyle({value}).visibility") == "visible"
    shown = page.evaluate(f"{value}.textContent")
    assert shown.startswith("layer 5, attention (model.language_model.layers.5.")
    assert shown.endswith("15% of the threshold") and page.evaluate(OVERFLOWING) == []
    page.hover(1, 1)
    assert page.evaluate(f"getComputedStyle({value}).visibility") == "hidden"
