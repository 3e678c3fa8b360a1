"""`--help` names every command, and shows examples that parse."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from exaone_bridge.cli.arguments import make_parser
from tests.helpers.cli import Cli

COMMANDS = [
    "demo",
    "tiny",
    "inspect",
    "import",
    "export",
    "train",
    "generate",
    "perplexity",
    "verify",
    "doctor",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example_that_parses(command: str) -> None:
    program = Path(sys.executable).with_name("exaone-bridge")
    done = subprocess.run(
        [program, *command.split(), "--help"],
        env=os.environ | {"COLUMNS": "120"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    examples = re.findall(r"Example: (exaone-bridge .*?)\s*$", done.stdout, re.MULTILINE)
    assert examples
    for example in examples:
        _, name, *arguments = shlex.split(example)
        assert name == (command or name)
        make_parser().parse_args([name, *arguments])  # raises UsageError if it cannot parse them


def test_help_names_every_command(cli: Cli) -> None:
    run = cli("--help")
    assert run.code == 0
    assert re.findall(r"^    (\w+) ", run.out, re.MULTILINE) == COMMANDS
