"""No command leaves a process behind."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cli import Cli


@pytest.mark.parametrize("command", ["import", "verify", "export"])
def test_command_leaves_no_process_behind(
    command: str, megatron_bridge: Any, tiny: Any, megatron_folder: Path, cli: Cli
) -> None:
    """Every forked process inherits the pipe; reading gives the end of file once all have ended."""
    reader, writer = os.pipe()
    try:
        output = [] if command == "verify" else ["output"]
        options = ["--tp", 2] if command == "verify" else ["--workers", 2]
        source = megatron_folder if command == "export" else tiny("exaone4")
        try:
            assert cli(command, source, *output, *options).code == 0
        finally:
            os.close(writer)
        ready, _, _ = select.select([reader], [], [], 20)
        assert ready and os.read(reader, 1) == b""
    finally:
        os.close(reader)
