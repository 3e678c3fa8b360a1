"""Runs Megatron-Bridge's training loop for a recipe, with a readable log and a curve of the loss.

The loop itself, checkpoints and resumption included, is Megatron-Bridge's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch  # before transformer_engine: the two ship different versions of cuDNN
from megatron.bridge.training.callbacks import Callback, CallbackContext

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes.loss_curve import loss_curve
from exaone_bridge.recipes.start_up import StartUpTimer

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = ["StepLogger", "check_installed", "run_training"]

LOSSES = "losses.jsonl"
CURVE = "loss.svg"


def check_installed() -> None:
    """Check that Megatron-Bridge's training loop can run here, before anything is written.

    Raises:
        UnsupportedConfig: there is no GPU, or a package is missing.
    """
    if find_spec("nvidia_resiliency_ext") is None:
        raise UnsupportedConfig(
            "nvidia_resiliency_ext",
            got="not installed",
            wanted="installed, because Megatron-Bridge's training loop imports it",
            where="environment",
            remedy="run `pip install nvidia-resiliency-ext`, or look at the plan with --dry-run",
        )
    if not torch.cuda.is_available():
        raise UnsupportedConfig(
            "GPU",
            got=None,
            wanted="a GPU, which Megatron-Bridge's training loop needs",
            where="machine",
            remedy="look at the plan with --dry-run",
        )


class StepLogger(Callback):
    """Writes loss, gradient norm, speed and peak memory of each step: a JSON line, and one to read.

    Only ranks of the last pipeline stage know the loss; the last rank writes. Reading the loss
    waits for the GPU, as Megatron-Bridge 0.6.2 does just before, after the optimizer's kernels
    (`training/train.py`, `train_step`: `reduce_max_stat_across_model_parallel_group`).
    """

    def __init__(self, path: Path, config: ConfigContainer, out: IO[str] | None = None) -> None:
        """Set up the log.

        Args:
            path: the file of JSON lines.
            config: the run's, for its number of steps and the tokens of a step.
            out: where the readable lines go; None: standard output.
        """
        self._path, self._config, self._out = path, config, out or sys.stdout
        self._world = int(os.environ.get("WORLD_SIZE", "1"))
        self._writes = int(os.environ.get("RANK", "0")) == self._world - 1
        self._before = time.perf_counter()

    def write(self, text: str) -> None:
        """Write a line to read, if this is the rank that writes."""
        if self._writes:
            print(text, file=self._out, flush=True)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Write the line of a step."""
        seconds = time.perf_counter() - self._before
        self._before = time.perf_counter()
        loss = context.loss_dict.get("lm loss") if context.loss_dict else None
        if loss is None or not self._writes:
            return
        loss = loss.float().flatten()
        # The mean, or the sum over tokens and their number.
        value = (loss[0] / loss[1] if loss.numel() == 2 else loss[0]).item()
        tokens = self._config.model.seq_length * self._config.train.global_batch_size
        line = {
            "step": context.state.train_state.step + 1,
            "loss": value,
            "grad_norm": float(context.grad_norm or 0),
            "seconds": round(seconds, 4),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.write(
            f"step {line['step']}/{self._config.train.train_iters}: loss {value:.4f}, "
            f"gradient norm {line['grad_norm']:.3f}, {seconds * 1000:,.0f} ms, "
            f"{tokens / seconds / self._world:,.0f} tokens/s per GPU, {line['peak_gb']} GB"
        )


def run_training(
    config: ConfigContainer,
    folder: Path,
    *,
    images: bool = False,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
) -> None:
    """Run Megatron-Bridge's training loop; losses and their curve are in the folder.

    After the first step the log has a line that says where the time of the start went.

    Args:
        config: of the run. `finetune` runs it where it has pretrained weights, else `pretrain`.
        folder: for `losses.jsonl` and `loss.svg`, which is drawn also if the run ends early.
        images: whether the batches have images.
        callbacks: further ones.
        quiet: send what Megatron prints to `logs/rankN.log` in the folder.

    Raises:
        UnsupportedConfig: the training loop cannot run here.
    """
    from megatron.bridge.training.config import apply_environment_variables

    apply_environment_variables(config)  # before CUDA starts, which reads some of them
    check_installed()
    from megatron.bridge.training import gpt_step, vlm_step
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    forward_step = vlm_step.forward_step if images else gpt_step.forward_step
    train = pretrain if config.checkpoint.pretrained_checkpoint is None else finetune
    folder.mkdir(parents=True, exist_ok=True)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    logged: Any = _megatron_output_in(folder / "logs") if quiet else contextlib.nullcontext()
    with _curve_at_the_end(folder), logged as out, _warnings_in(out):
        logger = StepLogger(folder / LOSSES, config, out)
        timer = StartUpTimer(config, logger.write)
        train(config, forward_step, callbacks=[logger, timer, *callbacks])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _curve_at_the_end(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        losses = folder / LOSSES
        if os.environ.get("RANK", "0") == "0" and losses.is_file():
            points = [json.loads(line) for line in losses.read_text().splitlines()]
            (folder / CURVE).write_text(
                loss_curve([(point["step"], point["loss"]) for point in points])
            )


@contextlib.contextmanager
def _warnings_in(out: IO[str] | None) -> Iterator[None]:
    """Write the warnings of exaone_bridge on rank 0 to the readable log too, if there is one."""
    if out is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    logger, handler = logging.getLogger("exaone_bridge"), logging.StreamHandler(out)
    handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _megatron_output_in(folder: Path) -> Iterator[IO[str]]:
    """Redirect both standard streams of this process to a file, and yield the former output.

    If the body raises, the end of the file is printed, with its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{os.environ.get('RANK', '0')}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    former = [os.dup(stream) for stream in (1, 2)]
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    try:
        with os.fdopen(os.dup(former[0]), "w") as out:
            yield out
    except BaseException:
        sys.stdout.flush()
        sys.stderr.flush()
        end = path.read_text(errors="replace").splitlines()[-20:]
        message = "\n".join([*end, f"exaone-bridge: the log of this rank is {path}", ""])
        os.write(former[1], message.encode())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, descriptor in zip((1, 2), former, strict=True):
            os.dup2(descriptor, stream)
            os.close(descriptor)
