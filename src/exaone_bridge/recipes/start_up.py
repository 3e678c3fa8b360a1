"""Measures where the time from the start of the process to the first training step goes.

A job pays that time at every restart, so `run_training` logs one line with the seconds at which
each part of the start ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = ["StartUpTimer", "seconds_since_process_start"]


def seconds_since_process_start() -> float:
    """Return the seconds since this process started, interpreter and imports included (Linux)."""
    # proc(5): field 22 is the start in clock ticks since boot; field 2 may contain parentheses.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class StartUpTimer(Callback):
    """Collects the times at which the parts of a start end, and reports them after the first step.

    Attributes:
        seconds: part -> seconds from the start of the process to its end, in the order of time:
            imports, model built, weights loaded (those of a checkpoint, and the optimizer's state),
            data ready, first step.
    """

    def __init__(self, config: ConfigContainer, report: Callable[[str], object]) -> None:
        """Begin the timeline: the imports are done.

        Args:
            config: the run's, whose provider gets a hook.
            report: is called once, with the timeline as one line.
        """
        self._report = report
        self.seconds: dict[str, float] = {}
        self.mark("imports")

        def model_built(model: list[Any]) -> list[Any]:
            self.mark("model built")
            return model

        # A function, because layers copy their config, and copies of a method copy its object.
        config.model.register_pre_wrap_hook(model_built, prepend=True)
        # Megatron-Bridge rejects a callback for this event where the run is given in epochs.
        if config.train.num_epochs is None:
            self.on_data_init_start = self._weights_loaded

    def mark(self, part: str) -> None:
        """Note that a part has ended, unless it has been noted before."""
        self.seconds.setdefault(part, round(seconds_since_process_start(), 1))

    def _weights_loaded(self, context: CallbackContext) -> None:
        self.mark("weights loaded")

    def on_train_start(self, context: CallbackContext) -> None:
        """Note that the training loop begins."""
        self.mark("data ready")

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Report the timeline after the first step."""
        if "first step" in self.seconds:
            return
        self.mark("first step")
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        self._report(f"seconds since the start of the process: {parts}")
