"""A context manager in which Megatron-Core runs without CUDA; nothing stays patched outside it.

Megatron-Core 0.19 calls `torch.cuda` for the current device, for random states and to synchronize.
Inside the context these calls have the results that suit a CPU; the table names the callers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from exaone_bridge.schema.json_types import JSONObject

__all__ = ["cpu_runtime"]

_CPU = torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Stream:
    """Operations on a CPU run in order, so there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> None: ...
    def synchronize(self) -> None: ...


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


_ANSWERS: JSONObject = {
    # rotary_pos_embedding.py, tensor_parallel/layers.py, p2p_communication.py, param_mapping.py:
    # the device of new tensors
    "current_device": lambda: _CPU,
    # model_provider.py, initialize.py: before init_process_group
    "set_device": _nothing,
    # p2p_communication.py, schedules.py, checkpointing.py
    "synchronize": _nothing,
    # dist_utils.py: the data-parallel wrapper is built on its own stream
    "Stream": _Stream,
    "current_stream": _Stream,
    "stream": contextlib.nullcontext,
    # checkpointing.py: the random state in a checkpoint
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": torch.manual_seed,
    # model_load_save.py, checkpointing.py: after a save
    "empty_cache": _nothing,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Puts tensors on the CPU that Megatron-Core makes on the device "cuda" or moves to it.

    The callers are schedules.py, finalize_model_grads.py and clip_grads.py.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: JSONObject | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)  # clip_grads.py asserts it
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if _is_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": _CPU}
        if kwargs.get("pin_memory"):  # rope_utils.py, get_pos_emb_on_this_cp_rank
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def _init_on_gloo(start: Any, backend: str | None = None, *args: object, **kwargs: object) -> None:
    if os.environ.get("WORLD_SIZE") == "1" and not args and not kwargs:
        # A single rank meets nobody, and needs no port, which another program may have.
        kwargs = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        atexit.unregister(_leave_process_groups)
        atexit.register(_leave_process_groups)  # no group of a single rank waits for another
    start("gloo" if backend in (None, "nccl") else backend, *args, **kwargs)


def _leave_process_groups() -> None:
    """End the threads of all process groups, if the program has not.

    A thread that releases a tensor while the interpreter finalises ends the program with SIGABRT.
    """
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # of models, which refer to the groups


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Let Megatron-Core build, run, train and save models on the CPU inside this context.

    Nothing is changed where CUDA is available. Contexts nest. Build models with
    `use_cpu_initialization=True`, and use process groups on gloo.
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    with contextlib.ExitStack() as stack:
        # A spawned queue process would import torch again on every rank; without CUDA it is safe to
        # fork it.
        forked_queue = functools.partial(filesystem_async.get_write_results_queue, "fork")
        stack.enter_context(
            mock.patch.object(filesystem_async, "get_write_results_queue", forked_queue)
        )
        # The tracker of dropout's random states: one equal on all tensor-parallel ranks, one not.
        stack.enter_context(mock.patch.object(random, "_get_cuda_rng_state", _get_rng_state))
        stack.enter_context(mock.patch.object(random, "_set_cuda_rng_state", _set_rng_state))
        # model_provider.py initialises nccl where there is no process group yet
        start = functools.partial(_init_on_gloo, torch.distributed.init_process_group)
        stack.enter_context(mock.patch.object(torch.distributed, "init_process_group", start))
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_CudaMeansCpu())
        yield
