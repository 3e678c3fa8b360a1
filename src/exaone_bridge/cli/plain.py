"""Arguments of `inspect` that have nothing wrong with them, read without typer.

Importing typer takes longer than inspecting a checkpoint. What is read here means what it means to typer, which a test
holds against the options of `app.py`; help, mistakes and whatever else is not plain are typer's, and None here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["COUNTS", "FLAGS", "Inspect", "inspect_arguments"]

COUNTS = ("--tp", "--pp", "--vpp", "--ep", "--etp")  # whole numbers from 1 up
FLAGS = ("--sp", "--json")


class Inspect(NamedTuple):
    """What `inspect` is asked for."""

    folder: Path
    layout: Layout
    as_json: bool


def inspect_arguments(arguments: list[str]) -> Inspect | None:
    """`inspect FOLDER` with options of `COUNTS` and `FLAGS` in any order.

    Raises:
        UnsupportedLayout: no model can be cut so.
    """
    if arguments[:1] != ["inspect"]:
        return None
    folders: list[str] = []
    counts: dict[str, int] = {}
    flags: set[str] = set()
    rest = iter(arguments[1:])
    for argument in rest:
        name, equals, value = argument.partition("=")
        if argument in FLAGS:
            flags.add(argument)
        elif name in COUNTS:
            text = value if equals else next(rest, "")
            if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
                return None
            counts[name[2:]] = int(text)
        elif argument.startswith("-"):
            return None
        else:
            folders.append(argument)
    if len(folders) != 1:
        return None
    return Inspect(Path(folders[0]), Layout(sp="--sp" in flags, **counts), "--json" in flags)
