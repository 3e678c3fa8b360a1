"""Scripts run as `python script arguments` would run them, in a fork of the tests' process.

It has imported Megatron already, which takes a new process half a minute. What that cannot show is that a script's
imports come in an order that works.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

import torch


def free_port() -> str:
    """Where the host's own for a single rank, 12355, may be taken: other tests run beside these."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _as_main(script: Path, arguments: list[str], port: str, printed: Path) -> None:
    sys.stdout = sys.stderr = printed.open("w", buffering=1)
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
    os.environ["MASTER_PORT"] = port
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def fork_script(work: Path, script: Path, *arguments: object) -> str:
    """What the script prints, which is also left in `work`; it must end well. For tests with the `host` fixture."""
    printed = work / "printed.txt"
    started = [str(argument) for argument in arguments], free_port(), printed
    process = multiprocessing.get_context("fork").Process(target=_as_main, args=(script, *started))
    process.start()
    process.join()
    assert process.exitcode == 0, printed.read_text()[-4000:]
    return printed.read_text()
