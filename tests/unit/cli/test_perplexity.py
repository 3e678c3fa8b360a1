"""`exaone-bridge perplexity`: Megatron-Core's loss at any layout is that of Transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import Cli


@pytest.fixture
def text(tmp_path: Path) -> Path:
    choose = random.Random(0)
    words = ["Seoul", "한국어", "window", "router", "the", "expert", "0123", "\n"]
    file = tmp_path / "text.txt"
    file.write_text(" ".join(choose.choice(words) for _ in range(300)), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("exaone4", ()),
        ("exaone4", ("--tp", 2, "--sp")),
        ("ernie45", ("--ep", 2)),
        ("ernie45-dense", ("--cp", 2)),
        ("exaone45", ("--pp", 2)),
        ("exaone-moe", ("--tp", 2, "--pp", 2)),
    ],
)
def test_loss_is_that_of_transformers(
    name: str,
    layout: tuple[object, ...],
    megatron_bridge: Any,
    tiny: Callable[..., Path],
    text: Path,
    cli: Cli,
) -> None:
    options = ("--text", text, "--length", 61, "--dtype", "fp32", "--json", "-")
    run = cli("perplexity", tiny(name), *options, *layout)
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found["difference"] < 1e-5  # the command itself allows 1e-4
    assert found["Megatron-Core"]["tokens"] == found["Transformers"]["tokens"] > 500
    assert found["Megatron-Core"]["loss"] > 1


def test_megatron_checkpoint_has_the_loss_of_its_source(
    megatron_bridge: Any, tiny: Callable[..., Path], megatron_folder: Path, text: Path, cli: Cli
) -> None:
    options = ("--text", text, "--length", 64, "--json")
    runs = [cli("perplexity", each, *options) for each in (tiny("exaone4"), megatron_folder)]
    losses = [json.loads(run.out)["Megatron-Core"]["loss"] for run in runs]
    assert losses[0] == losses[1]
    shown = cli("perplexity", megatron_folder, "--text", text, "--length", 64)
    assert shown.code == 0 and "Megatron-Core" in shown.out and "Transformers" not in shown.out


def test_another_loss_than_that_of_transformers_exits_with_1(
    megatron_bridge: Any,
    tiny: Callable[..., Path],
    text: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from exaone_bridge.runtime import perplexity

    right = perplexity.forward_losses
    monkeypatch.setattr(perplexity, "forward_losses", lambda *args: right(*args) * 1.001)
    options = ("--text", text, "--length", 64, "--dtype", "float32")
    run = cli("perplexity", tiny("exaone4"), *options)
    assert run.code == 1 and "nats per token, and 1e-04 is allowed" in run.err


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--text", "missing.txt"), "missing.txt: cannot be read"),
        (("--text", "text.txt", "--length", 5000), "less than the"),
    ],
)
def test_bad_text_is_rejected(
    options: tuple[object, ...],
    fragment: str,
    megatron_bridge: Any,
    tiny: Callable[..., Path],
    text: Path,
    cli: Cli,
) -> None:
    run = cli("perplexity", tiny("exaone4"), *options)
    assert run.code == 2 and fragment in run.err
