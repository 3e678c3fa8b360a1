"""A world of N ranks on this machine: forked, on gloo, inside `cpu_runtime`.

Ranks are forked from a parent that has imported Megatron already, because that import takes half a minute a process.
The parent starts no thread pool of torch's on their behalf, and each rank computes on one thread: OpenMP's pool does
not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from exaone_bridge.errors import BridgeError

__all__ = ["RankFailure", "emit", "run_ranks"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_TO_END = 30  # for a rank that has sent its result

_to_parent: multiprocessing.connection.Connection | None = None


class RankFailure(BridgeError):
    """A rank died, or raised what is not ours; the message ends with what it printed last."""


def emit(event: Any) -> None:
    """From a rank: tell the parent something while the work goes on. Outside a rank: nothing happens."""
    if _to_parent is not None:
        _to_parent.send_bytes(pickle.dumps(("event", event)))


def _rank_main(
    target: Callable[..., Any],
    rank: int,
    ranks: int,
    folder: str,
    connection: Any,
    args: tuple[Any, ...],
) -> None:
    global _to_parent
    _to_parent = connection
    gc.freeze()  # what the parent has imported, 700,000 objects: a collection here need not look through it again
    os.setsid()  # a process group of its own, so that what saving a checkpoint starts ends with the rank
    with contextlib.suppress(
        AttributeError, OSError
    ):  # Linux: end with the parent, however that ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(f"{folder}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (
        1,
        2,
    ):  # what Megatron prints belongs into the log, not between the lines of a progress bar
        os.dup2(log, stream)
    try:
        import torch
        import torch.distributed as dist

        from exaone_bridge.runtime.cpu import cpu_runtime

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(minutes=30),
        )
        with cpu_runtime():
            result = target(*args)
        dist.barrier()
        message = pickle.dumps(("done", result))
    except BaseException as error:
        traceback.print_exc()
        reported = (
            error
            if isinstance(error, BridgeError)
            else RankFailure(f"rank {rank}: {traceback.format_exc()}")
        )
        message = pickle.dumps(("error", reported))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(message)
    connection.close()
    # Returning, not os._exit: multiprocessing then ends the processes that saving a checkpoint has started.


def run_ranks[T](
    target: Callable[..., T],
    ranks: int,
    *args: Any,
    on_event: Callable[[int, Any], None] | None = None,
) -> list[T]:
    """Run `target(*args)` on each of `ranks` forked ranks; their results, in rank order.

    Args:
        target: runs inside an initialised gloo world and `cpu_runtime`; its result must be picklable.
        ranks: processes.
        on_event: called in this process with (rank, event) for each `emit`.

    Raises:
        BridgeError: the first that a rank raised; every other rank is then ended.
        RankFailure: a rank died, or raised something else.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_rank_main, args=(target, rank, ranks, folder, send, args))
            for rank, (_, send) in enumerate(pipes)
        ]
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for process, (_, send) in zip(processes, pipes, strict=True):
                process.start()
                send.close()
            results = _collect([receive for receive, _ in pipes], processes, Path(folder), on_event)
            for process in processes:
                process.join(timeout=_SECONDS_TO_END)
            return results
        finally:
            for process in processes:
                if process.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()  # if it had no group of its own yet
                    process.join()


def _collect(
    receivers: list[Any],
    processes: list[Any],
    folder: Path,
    on_event: Callable[[int, Any], None] | None,
) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(receivers))
    while waiting:
        for receiver in multiprocessing.connection.wait(list(waiting.values())):
            rank = next(number for number, candidate in waiting.items() if candidate is receiver)
            try:
                kind, value = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                raise RankFailure(
                    f"rank {rank} died (exit code {processes[rank].exitcode}); it last printed: {_tail(folder, rank)}"
                ) from None
            if kind == "event":
                if on_event is not None:
                    on_event(rank, value)
                continue
            if kind == "error":
                raise value
            results[rank] = value
            del waiting[rank]
    return [results[rank] for rank in sorted(results)]


def _tail(folder: Path, rank: int, size: int = 2000) -> str:
    with contextlib.suppress(OSError):
        return (folder / f"rank{rank}.log").read_text(errors="replace")[-size:].strip()
    return ""
