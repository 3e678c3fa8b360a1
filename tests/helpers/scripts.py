"""Scripts that run as `python script arguments`, in a fork of the tests' process.

The fork has imported Megatron-Bridge already, which takes a new process 20 s. Therefore it cannot
show that the order of the script's imports works.
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
    """Return a free port: other tests may use 12355, Megatron-Bridge's port of a single rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _as_main(script: Path, arguments: list[str], port: str, output: Path) -> None:
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
    os.environ["MASTER_PORT"] = port
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def fork_script(work: Path, script: Path, *arguments: object) -> str:
    """Run a script, which must exit with 0; the test needs the `megatron_bridge` fixture.

    Returns:
        The output of the script, which is also in `work`.
    """
    output = work / "printed.txt"
    started = [str(argument) for argument in arguments], free_port(), output
    process = multiprocessing.get_context("fork").Process(target=_as_main, args=(script, *started))
    process.start()
    process.join()
    assert process.exitcode == 0, output.read_text()[-4000:]
    return output.read_text()
