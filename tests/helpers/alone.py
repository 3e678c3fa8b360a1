"""Runs a function without a world, as a user's script does."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_alone(target: Callable[..., None], *args: Any) -> None:
    """In a forked process without a world: AutoBridge starts its own, as in a user's script."""
    process = multiprocessing.get_context("fork").Process(target=_main, args=(target, args))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{target.__name__} failed: see the captured output"


def _main(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    from exaone_bridge import cpu_runtime

    torch.set_num_threads(1)
    try:
        with cpu_runtime():
            target(*args)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
