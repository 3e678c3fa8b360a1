"""The parser of the command line, without the commands. No torch."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from exaone_bridge.cli.outputs import STANDARD_OUTPUT
from exaone_bridge.errors import BridgeError

__all__ = ["Completion", "Parser", "UsageError", "Version", "add_command"]

# The commands whose --json may be followed by their model, as a file's name is optional there.
_AFTER_JSON = {"inspect": "folder", "perplexity": "source"}


class UsageError(BridgeError):
    """An argument of the command line is unknown, missing or malformed."""


class Parser(ArgumentParser):
    """A parser that raises UsageError where argparse exits with an error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` lists the arguments.")

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        options: Namespace
        options, rest = self.parse_known_args(*args, **kwargs)
        if hasattr(options, "settings"):  # argparse takes those before the first option only
            options.settings += [each for each in rest if not each.startswith("-")]
            rest = [each for each in rest if each.startswith("-")]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        model = _AFTER_JSON.get(options.command)
        if model is not None and getattr(options, model) is None:
            if options.json in (None, STANDARD_OUTPUT):
                raise UsageError(
                    f"{model.upper()} is missing; "
                    f"`exaone-bridge {options.command} --help` lists the arguments."
                )
            setattr(options, model, options.json)  # `inspect --json FOLDER`
            options.json = STANDARD_OUTPUT
        if options.command == "export" and options.peft and options.adapter is None:
            raise UsageError(
                "--peft needs --adapter DIR; `exaone-bridge export --help` lists the arguments."
            )
        return options

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own hides a BrokenPipeError

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # raises BrokenPipeError here, where main() catches it
        super().exit(status, message)


class Version(argparse.Action):
    """Prints the version and exits."""

    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        from exaone_bridge import __version__

        print(__version__)
        parser.exit()


class Completion(argparse.Action):
    """Prints the completion script of a shell and exits."""

    def __call__(self, parser: ArgumentParser, _: object, shell: Any, __: object = None) -> None:
        try:
            import shtab
        except ImportError:
            raise UsageError(
                "--print-completion needs shtab; run `pip install 'exaone-bridge[completion]'`."
            ) from None
        for action in _actions(parser):
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def _actions(parser: ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def add_command(commands: Any, name: str, description: str, example: str) -> ArgumentParser:
    """Add a command; the first sentence of its description is its help in the list."""
    parser: ArgumentParser = commands.add_parser(
        name,
        help=description.partition(".")[0],
        description=description,
        epilog=f"Example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser
