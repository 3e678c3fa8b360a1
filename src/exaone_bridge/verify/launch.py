"""Where the work runs: on forked ranks of this machine, or in the world that torchrun has started."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from exaone_bridge.errors import UnsupportedLayout

__all__ = ["is_first", "run_alone", "run_world", "under_torchrun", "work_folder"]

OnEvent = Callable[[int, Any], None] | None


def under_torchrun() -> bool:
    """Whether ranks are there already."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def _join() -> int:
    """Enter torchrun's world if nobody has; ranks in it."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_world_size()


def run_world[T](target: Callable[..., T], ranks: int, *args: Any, on_event: OnEvent = None) -> list[T]:
    """Run `target(*args)` on every rank; all results, in rank order, on every process.

    Raises:
        UnsupportedLayout: torchrun has started another number of ranks than the layout has.
        BridgeError: what a rank raises.
    """
    from exaone_bridge.host.world import run_ranks

    if not under_torchrun():
        importlib.import_module("exaone_bridge.host.model")  # half of Megatron-Bridge: once here, not on every rank
        return run_ranks(target, ranks, *args, on_event=on_event)
    import torch.distributed as dist

    from exaone_bridge.host.cpu_runtime import cpu_runtime

    if (found := _join()) % ranks:
        raise UnsupportedLayout(
            "ranks", got=found, wanted=f"a multiple of {ranks}", remedy=f"run torchrun with --nproc_per_node {ranks}"
        )
    with cpu_runtime():
        result = target(*args)
    results: list[Any] = [None] * found
    dist.all_gather_object(results, result)
    return results


def run_alone[T](target: Callable[..., T], *args: Any, on_event: OnEvent = None) -> T:
    """Run `target(*args)` on one rank; its result, on every process."""
    from exaone_bridge.host.world import run_ranks

    if not under_torchrun():
        return run_ranks(target, 1, *args, on_event=on_event)[0]
    import torch.distributed as dist

    _join()
    box: list[Any] = [None]
    if is_first():
        try:
            box = [(True, target(*args))]
        except Exception as error:  # the others wait for an answer: they fail with the same
            box = [(False, error)]
    dist.broadcast_object_list(box, src=0)
    worked, value = box[0]
    if not worked:
        raise value
    return value


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder, the same for all ranks of one machine."""
    if not under_torchrun():
        with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as path:
            yield Path(path)
        return
    import torch.distributed as dist

    _join()
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-") if is_first() else contextlib.nullcontext("") as path:
        box = [path]
        dist.broadcast_object_list(box, src=0)
        yield Path(box[0])
        dist.barrier()
