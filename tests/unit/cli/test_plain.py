"""Arguments that are read without typer mean what they mean to typer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exaone_bridge.cli import inspect as inspect_module
from exaone_bridge.cli.app import app
from exaone_bridge.cli.plain import COUNTS, FLAGS, Inspect, inspect_arguments
from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.parallel_layout import Layout


def by_typer(arguments: list[str]) -> object:
    """What typer calls `inspect` with, the error of a layout, or the class of what it refuses by."""
    asked: list[Inspect] = []

    def inspect(folder: Path, layout: Layout, *, as_json: bool) -> None:
        asked.append(Inspect(folder, layout, as_json))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_module, "inspect", inspect)
        try:
            app(arguments, standalone_mode=False)
        except UnsupportedLayout as error:
            return str(error)
        except Exception as error:
            return type(error)
    (found,) = asked
    return found


def by_us(arguments: list[str]) -> object:
    try:
        return inspect_arguments(arguments)
    except UnsupportedLayout as error:
        return str(error)


def test_every_option_of_inspect_is_known() -> None:
    command: Any = typer.main.get_command(app)
    options = {
        name
        for option in command.commands["inspect"].params
        for name in option.opts
        if name.startswith("--")
    }
    assert options - {"--help"} == {*COUNTS, *FLAGS}


PLAIN = [
    "inspect",
    "a folder",
    "--tp",
    "2",
    "--json",
    "--pp=4",
    "--vpp",
    "2",
    "--sp",
    "--ep",
    "03",
    "--etp",
    "1",
]


def test_plain_arguments_are_read() -> None:
    layout = Layout(tp=2, pp=4, vpp=2, sp=True, ep=3, etp=1)
    assert by_us(PLAIN) == Inspect(Path("a folder"), layout, True) == by_typer(PLAIN)
    assert (
        by_us(["inspect", "x"]) == Inspect(Path("x"), Layout(), False) == by_typer(["inspect", "x"])
    )


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["import", "x", "y"], ["inspect", "x", "y"], ["inspect", "--help"], ["inspect", "x", "--tp"],
     ["inspect", "x", "--tp", "0"], ["inspect", "x", "--tp", "-1"], ["inspect", "x", "--tp", "two"],
     ["inspect", "x", "--tp=\u0662"], ["inspect", "x", "--tpp", "2"], ["inspect", "x", "--json=yes"],
     ["inspect", "-x"]],
    ids=str,
)  # fmt: skip
def test_what_is_not_plain_is_left_to_typer(arguments: list[str]) -> None:
    assert by_us(arguments) is None


TOKENS = [
    *COUNTS, *FLAGS, "1", "2", "8", "0", "-1", "007", "1_0", " 2", "two", "", "folder", "a b", "--", "-", "--tp=2",
    "--tp=", "--sp=1", "--pp=3=4", "--help", "--t", "-x", "\u0662",
]  # fmt: skip


@given(st.lists(st.sampled_from(TOKENS), max_size=7))
@example(PLAIN[1:])
@example(["folder", "--vpp", "2"])
@example(["folder", "--tp", "1", "--tp", "2"])
@example(["folder", "--tp", "--sp"])
@settings(deadline=None)  # typer's own start is of the first
def test_what_is_read_is_what_typer_reads(arguments: list[str]) -> None:
    ours = by_us(["inspect", *arguments])
    assert ours is None or ours == by_typer(["inspect", *arguments])
