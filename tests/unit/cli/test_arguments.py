"""The argument parser: what it accepts, and that it rejects everything else in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from exaone_bridge.cli.arguments import make_parser
from exaone_bridge.cli.options import layout_of
from exaone_bridge.cli.parser import UsageError
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.cli import Cli

INSPECT = ["inspect", "folder", "--tp", "2", "--json", "--pp=4", "--vpp", "2", "--sp"]
INSPECT += ["--ep", "03", "--etp", "1"]


def test_every_option_of_inspect_reaches_the_layout() -> None:
    options = make_parser().parse_args(INSPECT)
    assert (options.folder, options.json) == (Path("folder"), Path("-"))
    assert layout_of(options) == Layout(tp=2, pp=4, vpp=2, sp=True, ep=3, etp=1)
    assert layout_of(make_parser().parse_args(["inspect", "folder"])) == Layout()


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["inspect", "x", "y"], ["nonsense"], ["inspect", "x", "--tp"],
     ["inspect", "x", "--tp", "0"], ["inspect", "x", "--tp", "-1"], ["inspect", "x", "--tp", "two"],
     ["inspect", "x", "--tpp", "2"], ["inspect", "x", "--t", "2"], ["verify"],
     ["verify", "--json", "-"], ["perplexity", "--text", "x"],
     ["inspect", "-x"], ["import", "x", "y", "--workers", "257"], ["verify", "x", "--seed", "-1"],
     ["export", "x", "y", "--peft"], ["export", "x", "y", "--workers", "9" * 30],
     ["tiny", "exaone4", "x", "--seed", "one"]],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_argument_is_rejected_in_one_line(arguments: list[str], cli: Cli) -> None:
    run = cli(*arguments)
    assert run.code == 2
    assert run.out == ""
    (line,) = run.err.splitlines()
    assert line.startswith("exaone-bridge: ")
    assert "--help` lists the arguments." in line


@pytest.mark.parametrize(
    ("command", "model"), [(["inspect"], "folder"), (["perplexity", "--text", "x"], "source")]
)
def test_the_model_may_follow_json(command: list[str], model: str) -> None:
    options = make_parser().parse_args([*command, "--json", "path"])
    assert (getattr(options, model), options.json) == (Path("path"), Path("-"))


def test_no_argument_prints_help(cli: Cli) -> None:
    run = cli()
    assert (run.code, run.err) == (2, "")
    assert run.out.startswith("usage: exaone-bridge")


def test_version(cli: Cli) -> None:
    from exaone_bridge import __version__

    run = cli("--version")
    assert (run.code, run.out, run.err) == (0, f"{__version__}\n", "")


TOKENS = [
    "--tp", "--pp", "--vpp", "--ep", "--etp", "--sp", "--json", "1", "2", "8", "0", "-1", "007",
    "1_0", " 2", "two", "", "folder", "a b", "--", "-", "--tp=2", "--tp=", "--sp=1", "--pp=3=4",
    "--t", "-x", "\u0662", "\u00b2",
]  # fmt: skip


@given(st.lists(st.sampled_from(TOKENS), max_size=7))
@example(["folder", "--vpp", "2"])
@example(["folder", "--tp", "1", "--tp", "2"])
@example(["folder", "--tp", "--sp"])
def test_any_arguments_make_options_or_a_typed_error(arguments: list[str]) -> None:
    try:
        options = make_parser().parse_args(["inspect", *arguments])
        layout = layout_of(options)
    except (UsageError, UnsupportedLayout):
        return
    assert isinstance(options.folder, Path)
    assert layout.ranks >= 1
