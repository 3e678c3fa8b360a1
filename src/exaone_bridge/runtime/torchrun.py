"""A launcher whose ranks torchrun has started; this process is one of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from exaone_bridge.errors import BridgeError, UnsupportedLayout
from exaone_bridge.runtime.fork import rank_failure
from exaone_bridge.runtime.launch import Launcher, is_rank_zero
from exaone_bridge.runtime.precision import full_fp32
from exaone_bridge.runtime.progress import Progress

__all__ = ["TorchrunLauncher", "is_local_to_rank"]

# Variables that torchrun sets (https://docs.pytorch.org/docs/stable/elastic/run.html).
_VARIABLES = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
_TIMEOUT = timedelta(hours=1)  # of collectives: ranks wait in one while rank 0 runs Transformers
_GROUPS = itertools.count()  # a group must not find the keys of an earlier one in the store
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_SECONDS_UNTIL_NOTICE = 10
_LOCAL_TO_RANK = "This rank raised it; the other ranks may not have."


def is_local_to_rank(error: BaseException) -> bool:
    """Return whether this rank alone may have met this error, so that rank 0 cannot report it."""
    return _LOCAL_TO_RANK in getattr(error, "__notes__", ())


class TorchrunLauncher(Launcher):
    """Runs functions on the ranks that torchrun has started."""

    def __init__(self, ranks: int = 1) -> None:
        """Check the number of ranks, before anything is computed.

        Args:
            ranks: the size of the layout.

        Raises:
            UnsupportedLayout: the number of torchrun's ranks is not a multiple of it, or there is
                no torchrun: only some of its variables are set, or they are not numbers.
        """
        found = _world_size()
        if found % ranks:
            raise UnsupportedLayout(
                "ranks",
                got=found,
                wanted=f"a multiple of {ranks}",
                remedy=f"run torchrun with --nproc_per_node {ranks}",
            )
        self._initialised_here = False

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        """Wait for all ranks, then leave the process group if it was initialised here.

        torchrun ends every rank as soon as one of them ends with an error; waiting lets rank 0
        finish what it writes. After an error that other ranks may not have, nothing waits: they
        may never arrive.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            return
        if error is not None and is_local_to_rank(error):
            return  # another rank may be in a collective of this group
        if error is None or isinstance(error, BridgeError):
            dist.barrier()
        if self._initialised_here:
            dist.destroy_process_group()
            self._initialised_here = False

    def _initialise(self) -> None:
        """Initialise the process group, unless the caller has.

        Raises:
            UnsupportedLayout: this machine has more ranks than GPUs.
        """
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            return
        device = None
        if torch.cuda.is_available():
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= gpus:
                found = os.environ.get("LOCAL_WORLD_SIZE", str(local + 1))
                remedy = f"run torchrun with --nproc_per_node {gpus}"
                raise UnsupportedLayout(
                    "ranks of this machine", got=found, wanted=f"one a GPU, {gpus}", remedy=remedy
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        with _says_what_it_waits_for():
            store, rank, world_size = _rendezvous()
            dist.init_process_group(
                "nccl" if device else "gloo",
                store=dist.PrefixStore(f"exaone_bridge/{next(_GROUPS)}", store),
                rank=rank,
                world_size=world_size,
                timeout=_TIMEOUT,
                device_id=device,
            )
        self._initialised_here = True

    def all[T](
        self, fn: Callable[..., T], *args: object, progress: Progress | None = None
    ) -> list[T]:
        """Run `fn` on every rank; see `Launcher`. An error that `fn` raises `is_local_to_rank`.

        A rank cannot send its error to the others, which may wait for it in another collective.
        """
        import torch.distributed as dist

        from exaone_bridge.runtime.cpu import cpu_runtime

        self._initialise()
        try:
            # Megatron-Core prints while it builds a model; stdout is for the caller's report.
            with (
                full_fp32(),
                cpu_runtime(),
                _restored_process(),
                contextlib.redirect_stdout(sys.stderr),
            ):
                result = _call(fn, args, progress)
        except Exception as error:
            error.add_note(_LOCAL_TO_RANK)
            raise
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, result)
        return results

    def first[T](self, fn: Callable[..., T], *args: object, progress: Progress | None = None) -> T:
        """Run `fn` on rank 0; see `Launcher`."""
        import torch.distributed as dist

        self._initialise()
        outcome: list[Any] = [None]
        if is_rank_zero():
            try:
                with full_fp32(), _restored_process():
                    outcome = [(True, _call(fn, args, progress))]
            except Exception as error:  # the other ranks wait for an outcome, and raise the same
                outcome = [(False, error)]
        dist.broadcast_object_list(outcome, src=0)
        succeeded, value = outcome[0]
        if not succeeded:
            dist.barrier()  # every rank has the error before one of them leaves the group
            raise value
        return value

    def subprocess[T](
        self, fn: Callable[..., T], *args: object, progress: Progress | None = None
    ) -> T:
        """Run `fn` in a new process without torchrun's variables; see `Launcher`.

        A rank holds a GPU and threads, and must not be forked. The new process reports no progress.
        """
        return self.first(_run_in_new_process, fn, *args)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """Make a temporary folder; see `Launcher`."""
        import torch.distributed as dist

        self._initialise()
        with (
            tempfile.TemporaryDirectory(prefix="exaone_bridge-")
            if is_rank_zero()
            else contextlib.nullcontext("")
        ) as path:
            shared = [path]
            dist.broadcast_object_list(shared, src=0)
            yield Path(shared[0])
            dist.barrier()


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """Return torchrun's store, this rank and the number of ranks.

    The store stays: a rank that connects again could reach the one that rank 0 is about to close.
    """
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=_TIMEOUT))


@contextlib.contextmanager
def _restored_process() -> Iterator[None]:
    """Restore the environment and Megatron-Core's parallel state: the caller's script goes on."""
    from megatron.core import parallel_state

    environment, initialised = dict(os.environ), parallel_state.is_initialized()
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():  # Megatron-Bridge sets some
            del os.environ[name]
        os.environ.update(environment)
        if not initialised:
            parallel_state.destroy_model_parallel()


def _initialised() -> bool:
    """Whether this process has a process group; without importing torch."""
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_initialized()


def _world_size() -> int:
    rank, ranks = (os.environ[name] for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        got, wanted = f"RANK={rank} and WORLD_SIZE={ranks}", "numbers, the first below the second"
    elif (missing := [name for name in _MASTER if name not in os.environ]) and not _initialised():
        got = f"RANK={rank} and WORLD_SIZE={ranks} without {' and '.join(missing)}"
        wanted = "all variables of torchrun, or neither RANK nor WORLD_SIZE"
    else:
        return int(ranks)
    remedy = "start this with torchrun, or unset RANK and WORLD_SIZE to run without it"
    raise UnsupportedLayout("environment", got=got, wanted=wanted, remedy=remedy)


@contextlib.contextmanager
def _says_what_it_waits_for() -> Iterator[None]:
    """Print what this process waits for if the body takes longer than ten seconds."""
    address, rank, ranks = (
        ":".join(os.environ[name] for name in names)
        for names in (_MASTER, ("RANK",), ("WORLD_SIZE",))
    )
    text = (
        f"exaone-bridge: rank {rank} waits for the other ranks of {ranks} at {address}; if "
        "torchrun has not started them, unset RANK and WORLD_SIZE."
    )
    timer = threading.Timer(_SECONDS_UNTIL_NOTICE, print, (text,), {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _call[T](fn: Callable[..., T], args: tuple[Any, ...], progress: Progress | None) -> T:
    return fn(*args) if progress is None else fn(*args, progress=progress)


def _run_in_new_process(fn: Callable[..., Any], *args: object) -> Any:
    environment = {
        name: value for name, value in os.environ.items() if not _VARIABLES.fullmatch(name)
    }
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as folder:
        file = Path(folder) / "call"
        file.write_bytes(pickle.dumps((fn, args)))
        ended = subprocess.run(
            [sys.executable, "-m", __name__, str(file)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if ended.returncode:
            what = f"the process of {fn.__name__} ended with {ended.returncode}"
            raise rank_failure(what, ended.stdout + ended.stderr)
        succeeded, value = pickle.loads(file.read_bytes())
    if not succeeded:
        raise value
    return value


def _call_in_this_process(file: Path) -> None:
    """Call the function in `file` with the arguments there, and replace it by the outcome."""
    fn, args = pickle.loads(file.read_bytes())
    try:
        outcome = (True, fn(*args))
    except BridgeError as error:
        outcome = (False, error)
    file.write_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _call_in_this_process(Path(sys.argv[1]))
