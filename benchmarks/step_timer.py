"""Times steps of Megatron-Bridge's training loop on the GPU, and sums up the kernels of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch  # before transformer_engine: the two bring different versions of cuDNN
from megatron.bridge.training.callbacks import Callback, CallbackContext


def busy_ms(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the milliseconds in which at least one of the intervals (microseconds) runs."""
    total, end = 0.0, float("-inf")
    for begin, stop in sorted(intervals):
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total / 1e3


class StepTimer(Callback):
    """Times steps with CUDA events, and traces the kernels of one more.

    Attributes:
        train_iters: the steps that it needs.
    """

    def __init__(self, warm_up: int, steps: int, profile: bool) -> None:
        """Set up the timer.

        Args:
            warm_up: steps that are not measured.
            steps: steps that are.
            profile: whether two more steps follow, the second of them traced.
        """
        self._warm_up, self._last = warm_up, warm_up + steps
        self._profile = profile
        self.train_iters = self._last + 2 * profile
        self._ends: list[Any] = []
        self._losses: list[torch.Tensor] = []
        self._trace: Any = None

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Record the end of the step on the GPU."""
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._ends.append(end)
        if context.loss_dict and "lm loss" in context.loss_dict:
            self._losses.append(context.loss_dict["lm loss"].float().flatten().clone())
        if self._profile and len(self._ends) == self._last + 1:
            torch.cuda.synchronize()
            self._trace = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA]
            ).__enter__()
        elif self._trace is not None and len(self._ends) == self._last + 2:
            torch.cuda.synchronize()
            self._trace.__exit__(None, None, None)

    def milliseconds(self) -> list[float]:
        """Return the duration of each measured step."""
        torch.cuda.synchronize()
        ends = self._ends[self._warm_up - 1 : self._last]
        return [begin.elapsed_time(end) for begin, end in itertools.pairwise(ends)]

    def losses(self) -> list[float]:
        """Return the loss of each step; empty on ranks that do not know it."""
        return [round(float(x[0] / x[1] if len(x) == 2 else x[0]), 5) for x in self._losses]

    def kernels(self) -> dict[str, Any]:
        """Return milliseconds of kernels in the traced step, and the longest kernels."""
        if self._trace is None:
            return {}
        events = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in self._trace.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        return kernel_times(events)


def kernel_times(events: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Summarise kernels: name, begin and end in microseconds."""
    every = [(begin, end) for _, begin, end in events]
    compute = [(begin, end) for name, begin, end in events if "nccl" not in name.lower()]
    sums: dict[str, float] = {}
    for name, begin, end in events:
        sums[name] = sums.get(name, 0.0) + (end - begin) / 1e3
    longest = sorted(sums.items(), key=lambda item: -item[1])[:12]
    return {
        "kernel_ms": round(busy_ms(every), 1),
        "exposed_nccl_ms": round(busy_ms(every) - busy_ms(compute), 1),
        "kernels": len(events),
        "longest_ms": {name[:90]: round(ms, 2) for name, ms in longest},
    }
