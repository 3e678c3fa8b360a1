"""Megatron-Bridge's training loop on a CPU, for tests of what runs in it: no GPU, no NCCL.

`cpu_runtime` lets Megatron-Core run; the loop itself (`initialize_megatron`, 0.6.2) also wants a
GPU to be there, a package for fault tolerance, and events.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import torch

from exaone_bridge import cpu_runtime

# What a recipe needs to run there.
SETTINGS = (
    "model.backend=torch", "dist.distributed_backend=gloo", "dataset.num_workers=0",
    "dataset.pin_memory=false",
)  # fmt: skip
GIB = 2**30


class _Event:
    """A CUDA event that takes its time from the CPU's clock."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3


def _init_process_group(start: Any, backend: str, **options: Any) -> None:
    options.pop("device_id", None)
    start("gloo" if backend == "nccl" else backend, **options)


def _provide_fault_tolerance() -> None:
    """Stand in for nvidia-resiliency-ext, of which a run without faults needs one name."""
    if "nvidia_resiliency_ext" in sys.modules:
        return
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__["CallWrapper"] = object
        sys.modules[name] = module


@contextlib.contextmanager
def cpu_training_loop() -> Iterator[None]:
    """Let `run_training` run on this process's CPU; call it in a forked process.

    The functions of torch.cuda that the loop calls do nothing, or return what a GPU would.
    """
    _provide_fault_tolerance()
    from megatron.bridge.training import initialize

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "max_memory_allocated": GIB,
        "memory_allocated": GIB, "memory_reserved": GIB, "max_memory_reserved": GIB,
        "memory_stats": {}, "reset_peak_memory_stats": None, "set_stream": None,
        "default_stream": None, "get_device_name": "CPU", "get_device_capability": (9, 0),
        "is_current_stream_capturing": False,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_runtime())
        start = functools.partial(_init_process_group, torch.distributed.init_process_group)
        replaced = [(torch.distributed, "init_process_group", start), (torch.cuda, "Event", _Event)]
        replaced += [
            (torch.cuda, name, mock.Mock(return_value=value)) for name, value in answers.items()
        ]
        replaced.append((initialize, "compile_helpers", mock.Mock()))  # of indexed data sets
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
