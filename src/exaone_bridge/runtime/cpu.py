"""Megatron-Core without CUDA: a context manager; nothing stays patched outside it.

Megatron-Core 0.19 asks `torch.cuda` where to put tensors, for its random state and to wait, in places where the
answer on a CPU is obvious. Inside the context it gets that answer; each entry of the table says who asks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["cpu_runtime"]

_CPU = torch.device("cpu")


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Stream:
    """A CPU does one thing after the other: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> None: ...
    def synchronize(self) -> None: ...


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


_ANSWERS: dict[str, Any] = {
    # rotary_pos_embedding.py, tensor_parallel/layers.py, p2p_communication.py, param_mapping.py: where tensors go
    "current_device": lambda: _CPU,
    # model_provider.py, initialize.py: before init_process_group
    "set_device": _nothing,
    # p2p_communication.py, schedules.py, checkpointing.py: wait for the device
    "synchronize": _nothing,
    # dist_utils.py: the data-parallel wrapper is built on a stream of its own
    "Stream": _Stream,
    "current_stream": _Stream,
    "stream": contextlib.nullcontext,
    # checkpointing.py: the state that a checkpoint remembers
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": torch.manual_seed,
    # model_load_save.py, checkpointing.py: after a save
    "empty_cache": _nothing,
}


class _CudaMeansCpu(TorchFunctionMode):
    """Tensors that Megatron-Core makes on, or moves to, the device it spells "cuda" (schedules.py,
    finalize_model_grads.py, clip_grads.py) are on the CPU."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
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
        if kwargs.get(
            "pin_memory"
        ):  # rope_utils.py, get_pos_emb_on_this_cp_rank: pinned for a copy to the device
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def _init_on_gloo(start: Any, backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    start("gloo" if backend in (None, "nccl") else backend, *args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.partition(":")[0] == "cuda"


@contextlib.contextmanager
def cpu_runtime() -> Iterator[None]:
    """Megatron-Core builds, runs, trains and saves on the CPU inside this context.

    Where CUDA is available nothing is changed. Contexts nest. Build models with `use_cpu_initialization=True`
    and communicate through gloo.
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    with contextlib.ExitStack() as stack:
        # Spawned, the queue's process imports torch anew on every rank; without CUDA a fork is as safe.
        forked_queue = functools.partial(filesystem_async.get_write_results_queue, "fork")
        stack.enter_context(
            mock.patch.object(filesystem_async, "get_write_results_queue", forked_queue)
        )
        # The tracker of dropout's random states, one for what tensor-parallel ranks share and one for what they do not.
        stack.enter_context(mock.patch.object(random, "_get_cuda_rng_state", _get_rng_state))
        stack.enter_context(mock.patch.object(random, "_set_cuda_rng_state", _set_rng_state))
        # model_provider.py asks for nccl where no process group is there yet
        start = functools.partial(_init_on_gloo, torch.distributed.init_process_group)
        stack.enter_context(mock.patch.object(torch.distributed, "init_process_group", start))
        for name, answer in _ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_CudaMeansCpu())
        yield
