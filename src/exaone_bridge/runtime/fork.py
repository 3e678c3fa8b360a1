"""A launcher whose ranks are forked processes of this machine, on gloo and inside `cpu_runtime`.

Ranks are forked, not spawned, because importing Megatron takes half a minute a process and the
parent has imported it already. The parent must not start torch's thread pool, since OpenMP's pool
does not survive a fork; each rank computes on one thread.
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
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

from exaone_bridge.errors import BridgeError
from exaone_bridge.runtime.launch import Launcher
from exaone_bridge.runtime.precision import full_fp32
from exaone_bridge.runtime.progress import NO_PROGRESS, Progress

__all__ = ["ForkLauncher", "RankFailure", "rank_failure"]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TIMEOUT = timedelta(minutes=30)  # of collectives
_SECONDS_TO_END = 30  # for a rank that has sent its result
_SECONDS_BETWEEN_REPORTS = 0.1
_INHERITED: list[object] = []  # on a rank: the process groups of the process that forked it
_LONGEST = 400  # characters of an error in a sentence


class RankFailure(BridgeError):
    """A rank died or raised another error than a BridgeError; a file that is named has details."""


class _RankProgress:
    """Reports a rank's progress to the parent process: rank 0's stages, and bytes every 0.1 s."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection, self._rank = connection, rank
        self._unreported, self._reported_at = 0, time.monotonic()

    def stage(self, text: str) -> None:
        if self._rank == 0:
            self._send("stage", text)

    def total(self, nbytes: int) -> None:
        self._send("total", nbytes)

    def advance(self, nbytes: int) -> None:
        self._unreported += nbytes
        if time.monotonic() - self._reported_at >= _SECONDS_BETWEEN_REPORTS:
            self.flush()

    def output(self, text: str) -> None:
        self._send("output", text)

    def flush(self) -> None:
        if self._unreported:
            self._send("advance", self._unreported)
        self._unreported, self._reported_at = 0, time.monotonic()

    def _send(self, kind: str, value: str | int) -> None:
        self._connection.send_bytes(pickle.dumps((kind, value)))


class ForkLauncher(Launcher):
    """Runs functions on forked processes, each a rank of a gloo process group."""

    def __init__(self, ranks: int = 1, *, megatron: bool = True) -> None:
        """Set up a launcher.

        Args:
            ranks: How many ranks `all` forks.
            megatron: Whether they run Megatron-Core; conversions do without it.
        """
        self._ranks, self._megatron = ranks, megatron

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        """Do nothing: forked ranks end with the call that forked them."""

    def all[T](
        self, fn: Callable[..., T], *args: object, progress: Progress | None = None
    ) -> list[T]:
        """Fork the ranks and run `fn` on each; see `Launcher`.

        Raises:
            BridgeError: the first one that a rank raised; every other rank is then ended.
            RankFailure: a rank died, or raised another error.
        """
        return self._run(self._ranks, fn, args, progress)

    def first[T](self, fn: Callable[..., T], *args: object, progress: Progress | None = None) -> T:
        """Run `fn` on a single forked rank, a process group of its own; see `all`."""
        return self._run(1, fn, args, progress)[0]

    def subprocess[T](
        self, fn: Callable[..., T], *args: object, progress: Progress | None = None
    ) -> T:
        """Run `fn` in this process, which is not a rank and may fork; see `Launcher`."""
        return fn(*args) if progress is None else fn(*args, progress=progress)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Make a temporary folder; see `Launcher`."""
        with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as path:
            yield Path(path)

    def _run[T](
        self,
        ranks: int,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        progress: Progress | None,
    ) -> list[T]:
        context = multiprocessing.get_context("fork")
        with self.folder() as folder:
            pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
            processes = [
                context.Process(
                    target=_rank_main,
                    args=(
                        fn,
                        args,
                        progress is not None,
                        self._megatron,
                        rank,
                        ranks,
                        folder,
                        send,
                    ),
                )
                for rank, (_, send) in enumerate(pipes)
            ]
            sys.stdout.flush()
            sys.stderr.flush()
            try:
                for process, (_, send) in zip(processes, pipes, strict=True):
                    process.start()
                    send.close()
                receivers = [receive for receive, _ in pipes]
                results = _collect(receivers, processes, folder, progress or NO_PROGRESS)
                for process in processes:
                    process.join(timeout=_SECONDS_TO_END)
                return results
            finally:
                for process in processes:
                    if process.pid is not None:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
                        process.kill()  # in case it has not made its own process group yet
                        process.join()


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    reports: bool,
    megatron: bool,
    rank: int,
    ranks: int,
    folder: Path,
    connection: Connection,
) -> None:
    # The parent has imported 700,000 objects; garbage collections here need not traverse them.
    gc.freeze()
    os.setsid()  # a process group of its own, so that its child processes end with it
    with contextlib.suppress(AttributeError, OSError):  # on Linux, end when the parent ends
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):  # Megatron's output goes to the log, not between lines of a progress bar
        os.dup2(log, stream)
    # A notebook's kernel has replaced these by objects of its own, which would print in the cell.
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, encoding="utf-8", errors="replace")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        _leave_inherited_groups()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=_TIMEOUT,
        )
        progress = _RankProgress(connection, rank)
        with full_fp32(), _runtime(megatron):
            result = fn(*args, progress=progress) if reports else fn(*args)
        progress.flush()
        dist.barrier()
        message = pickle.dumps(("done", result))
    except BaseException as error:
        if isinstance(error, BridgeError):
            message = pickle.dumps(("error", error))
        else:
            message = pickle.dumps(("raised", (_one_line(error), traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send_bytes(message)
    connection.close()
    # Returning, not os._exit, lets multiprocessing end the child processes of a checkpoint's save.


def _runtime(megatron: bool) -> AbstractContextManager[None]:
    if not megatron:
        return contextlib.nullcontext()
    from exaone_bridge.runtime.cpu import cpu_runtime

    return cpu_runtime()


def _leave_inherited_groups() -> None:
    """Leave the process groups of a caller that is a rank itself; the caller's stay as they are."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    # Their threads have not been forked, and would be waited for if the groups were freed.
    _INHERITED.extend(dist.distributed_c10d._world.pg_map)
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _collect(
    receivers: Sequence[Connection],
    processes: Sequence[ForkProcess],
    folder: Path,
    progress: Progress,
) -> list[Any]:
    """Forward the ranks' progress until every rank has sent its result.

    Returns:
        The results in rank order.
    """
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    while waiting:
        for receiver in multiprocessing.connection.wait(list(waiting)):
            assert isinstance(receiver, Connection)
            rank = waiting[receiver]
            try:
                message = pickle.loads(receiver.recv_bytes())
            except EOFError:
                processes[rank].join()
                how = _how_it_ended(processes[rank].exitcode)
                raise rank_failure(f"rank {rank} {how}", _log(folder, rank)) from None
            match message:
                case "stage", text:
                    progress.stage(text)
                case "total", nbytes:
                    progress.total(nbytes)
                case "advance", nbytes:
                    progress.advance(nbytes)
                case "output", text:
                    progress.output(text)
                case "error", error:
                    raise error
                case "raised", (text, trace):
                    what, output = f"rank {rank} raised {text}", _log(folder, rank) + trace
                    raise rank_failure(what, output, part="traceback")
                case "done", result:
                    results[rank] = result
                    del waiting[receiver]
    return [results[rank] for rank in sorted(results)]


def rank_failure(what: str, output: str, *, part: str = "output") -> RankFailure:
    """Make the error of a rank, with its output in a file that stays.

    Args:
        what: The sentence without its end, such as "rank 1 raised ValueError: no".
        output: All that the rank has printed; a traceback is at its end.
        part: What the sentence says is in the file.
    """
    with tempfile.NamedTemporaryFile(
        "w", prefix="exaone_bridge-", suffix=".log", delete=False, errors="replace"
    ) as file:
        file.write(output)
    failure = RankFailure(f"{what}; its {part} is in {file.name}.")
    failure.add_note(output[-2000:])  # a traceback of Python prints it, and the command line not
    return failure


def _log(folder: Path, rank: int) -> str:
    with contextlib.suppress(OSError):
        return (folder / f"rank{rank}.log").read_text(errors="replace")
    return ""


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code} without a result"
    hint = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code} ({signal.strsignal(-code)}){hint}"


def _one_line(error: BaseException) -> str:
    """Return an error's type and message without line breaks, and without its end if it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
