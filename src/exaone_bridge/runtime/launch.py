"""Where the work runs: on forked ranks of this machine, or in the world that torchrun has started."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from exaone_bridge.errors import BridgeError, UnsupportedLayout

__all__ = [
    "check_ranks",
    "full_fp32",
    "is_first",
    "leave",
    "run_alone",
    "run_apart",
    "run_world",
    "speaks",
    "under_torchrun",
    "work_folder",
]

OnEvent = Callable[[int, Any], None] | None

# What torchrun tells its ranks (https://docs.pytorch.org/docs/stable/elastic/run.html), beside TORCHELASTIC_*.
_TOLD = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)
_PATIENCE = timedelta(hours=1)  # while the first rank runs Transformers, the others wait

_joined = False  # this process entered torchrun's world here, and leaves it here
_working = False  # what this rank raises now, others may not have met


def under_torchrun() -> bool:
    """Whether ranks are there already."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def speaks() -> bool:
    """Whether this process says what went wrong: the first, or any in the midst of what others may do without fault."""
    return is_first() or _working


def _join() -> int:
    """Enter torchrun's world if nobody has; ranks in it.

    Raises:
        UnsupportedLayout: more ranks on this machine than GPUs.
    """
    import torch
    import torch.distributed as dist

    global _joined
    if not dist.is_initialized():
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
        dist.init_process_group("nccl" if device else "gloo", timeout=_PATIENCE, device_id=device)
        _joined = True
    return dist.get_world_size()


def leave() -> None:
    """Wait until the first rank has written what is to be written, and end the world if it was entered here.

    torchrun ends every rank as soon as one has ended with an error: none may before that.
    """
    global _joined
    if not under_torchrun():
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    dist.barrier()
    if _joined:
        dist.destroy_process_group()
        _joined = False


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Products of fp32 in fp32, on GPUs too. The bound of rounding knows no TF32, which keeps ten bits of 23.

    Torch convolves in TF32 unless told otherwise, and Transformer Engine multiplies in it whatever torch is told
    (`transformer_engine/common/gemm/cublaslt_gemm.cu`); NVIDIA's libraries look at the variable when they first run.
    """
    import torch

    variable = "NVIDIA_TF32_OVERRIDE"
    before = os.environ.get(variable)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    os.environ[variable] = "0"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def check_ranks(ranks: int) -> None:
    """Refuse a layout of another number of ranks than torchrun has started, before anything is computed.

    Raises:
        UnsupportedLayout: they are no multiple of it.
    """
    if under_torchrun() and (found := int(os.environ["WORLD_SIZE"])) % ranks:
        raise UnsupportedLayout(
            "ranks",
            got=found,
            wanted=f"a multiple of {ranks}",
            remedy=f"run torchrun with --nproc_per_node {ranks}",
        )


def run_world[T](
    target: Callable[..., T], ranks: int, *args: Any, on_event: OnEvent = None
) -> list[T]:
    """Run `target(*args)` on every rank; all results, in rank order, on every process.

    Raises:
        UnsupportedLayout: torchrun has started another number of ranks than the layout has.
        BridgeError: what a rank raises.
    """
    from exaone_bridge.runtime.ranks import run_ranks

    if not under_torchrun():
        import exaone_bridge.runtime.model  # noqa: F401  half of Megatron-Bridge: once here, not on every rank

        with full_fp32():
            return run_ranks(target, ranks, *args, on_event=on_event)
    import torch.distributed as dist

    from exaone_bridge.runtime.cpu import cpu_runtime

    global _working
    check_ranks(ranks)
    found = _join()
    _working = True
    # What Megatron prints as it builds a model is not the report.
    with full_fp32(), cpu_runtime(), contextlib.redirect_stdout(sys.stderr):
        result = target(*args)
    results: list[Any] = [None] * found
    dist.all_gather_object(results, result)
    _working = False
    return results


def run_alone[T](target: Callable[..., T], *args: Any, on_event: OnEvent = None) -> T:
    """Run `target(*args)` on one rank; its result, on every process."""
    from exaone_bridge.runtime.ranks import run_ranks

    if not under_torchrun():
        with full_fp32():
            return run_ranks(target, 1, *args, on_event=on_event)[0]
    import torch.distributed as dist

    _join()
    box: list[Any] = [None]
    if is_first():
        try:
            with full_fp32():
                box = [(True, target(*args))]
        except Exception as error:  # the others wait for an answer: they fail with the same
            box = [(False, error)]
    dist.broadcast_object_list(box, src=0)
    worked, value = box[0]
    if not worked:
        raise value
    return value


def run_apart[T](target: Callable[..., T], *args: Any, on_event: OnEvent = None) -> T:
    """Run `target(*args)` once, where it may fork ranks of its own; its result, on every process.

    Under torchrun that is a new process, which knows of no world: a rank holds a GPU and threads, and is not forked.

    Args:
        target: a function of a module, which the new process imports.
        on_event: handed on to it, but for a new process, which cannot call it.

    Raises:
        BridgeError: what it raises.
        RankFailure: the process died, or raised what is not ours.
    """
    return (
        run_alone(_in_new_process, target, *args)
        if under_torchrun()
        else target(*args, on_event=on_event)
    )


def _in_new_process(target: Callable[..., Any], *args: Any) -> Any:
    from exaone_bridge.runtime.ranks import RankFailure

    code = "import sys; from exaone_bridge.runtime.launch import answer; answer(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if not _TOLD.fullmatch(name)}
    with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as folder:
        file = Path(folder) / "question"
        file.write_bytes(pickle.dumps((target, args)))
        command = [sys.executable, "-c", code, str(file)]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if ended.returncode:
            raise RankFailure(
                f"the process of {target.__name__} ended with {ended.returncode}: {ended.stderr[-2000:]}"
            )
        worked, value = pickle.loads(file.read_bytes())
    if not worked:
        raise value
    return value


def answer(file: str) -> None:
    """In a new process: call what the file asks for, and leave there what came of it."""
    target, args = pickle.loads(Path(file).read_bytes())
    try:
        found = (True, target(*args))
    except BridgeError as error:
        found = (False, error)
    Path(file).write_bytes(pickle.dumps(found))


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder, the same for all ranks of one machine."""
    if not under_torchrun():
        with tempfile.TemporaryDirectory(prefix="exaone_bridge-") as path:
            yield Path(path)
        return
    import torch.distributed as dist

    _join()
    with (
        tempfile.TemporaryDirectory(prefix="exaone_bridge-")
        if is_first()
        else contextlib.nullcontext("") as path
    ):
        box = [path]
        dist.broadcast_object_list(box, src=0)
        yield Path(box[0])
        dist.barrier()
