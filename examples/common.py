"""Arguments, config and logging that the examples with recipes share."""

# ruff: noqa: I001  (exaone_bridge before megatron.bridge, which needs it without Transformer Engine)

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch  # before transformer_engine: the two ship different versions of cuDNN

import exaone_bridge  # noqa: F401  registers the models with Megatron-Bridge
from exaone_bridge.errors import BridgeError
from exaone_bridge.recipes import recipe
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer

PLAN_FIELDS = ("tp", "pp", "vpp", "ep", "etp", "cp")
PLAN_FIELDS += ("seq_length", "micro_batch_size", "global_batch_size")
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def make_parser(description: str, default_recipe: str) -> argparse.ArgumentParser:
    """Make a parser with the arguments that all examples have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--recipe", type=recipe_name, default=default_recipe, help="see docs/recipes.md")
    add("--gpu-memory", type=int, default=80, help="memory of one GPU in GB: 80 or 141")
    add("--hf-path", type=Path, help="Hugging Face directory: config, tokenizer and weights")
    for field in PLAN_FIELDS:
        add(f"--{field.replace('_', '-')}", type=int, help="instead of the recipe's")
    add("--iters", type=int, default=10, help="optimizer steps")
    add("--lr", type=float, help="peak learning rate")
    add("--save", type=Path, required=True, help="directory for all output")
    add("--save-interval", type=int, default=0, help="steps; 0: at the end only; -1: never")
    add("--load", type=Path, help="--save of an earlier run, to resume")
    add("--ckpt-step", type=int, help="step to resume from; the default is the last")
    add("--dry-run", action="store_true", help="print the config and stop")
    return parser


def recipe_name(name: str) -> str:
    """Reject the name of a recipe that does not exist, before anything is written."""
    try:
        recipe(name)
    except BridgeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def check_installed(options: argparse.Namespace) -> None:
    """End the script before it writes anything if Megatron-Bridge's training loop cannot run."""
    if not options.dry_run and find_spec("nvidia_resiliency_ext") is None:
        sys.exit(
            "Megatron-Bridge's training loop needs nvidia_resiliency_ext, which is not installed; "
            "run `pip install nvidia-resiliency-ext`, or add --dry-run to see the config."
        )


def build_config(options: argparse.Namespace, **recipe_arguments: Any) -> ConfigContainer:
    """Call the recipe and apply the arguments; the number of GPUs is torchrun's."""
    overrides = {field: getattr(options, field) for field in PLAN_FIELDS}
    overrides = {field: value for field, value in overrides.items() if value is not None}
    if "tp" in overrides:
        overrides["sp"] = overrides["tp"] > 1
    if "WORLD_SIZE" in os.environ:
        overrides["gpus"] = int(os.environ["WORLD_SIZE"])
    config = recipe(options.recipe)(
        gpu_memory_gb=options.gpu_memory, hf_path=options.hf_path, **recipe_arguments, **overrides
    )
    config.train.train_iters = config.scheduler.lr_decay_iters = options.iters
    config.scheduler.lr_warmup_iters = min(config.scheduler.lr_warmup_iters, options.iters // 10)
    if options.lr is not None:
        config.optimizer.lr, config.optimizer.min_lr = options.lr, options.lr / 10
    config.validation.eval_iters, config.validation.eval_interval = 0, options.iters
    config.logger.log_interval, config.logger.tensorboard_dir = 1, None
    save = options.save_interval >= 0
    config.checkpoint.save = str(options.save / "checkpoints") if save else None
    config.checkpoint.save_interval = max(options.save_interval, 0) or options.iters
    config.checkpoint.load = None if options.load is None else str(options.load / "checkpoints")
    config.checkpoint.ckpt_step = options.ckpt_step
    return config


class LossLogger(Callback):
    """Write loss, gradient norm and peak memory of each step to a JSON lines file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_step_end(self, context: CallbackContext) -> None:
        loss = context.loss_dict.get("lm loss") if context.loss_dict else None
        if loss is None:  # only the last pipeline stage has it
            return
        loss = loss.float().flatten()
        # The mean, or the sum over tokens and their number.
        value = (loss[0] / loss[1] if loss.numel() == 2 else loss[0]).item()
        line = {
            "step": context.state.train_state.step + 1,
            "loss": value,
            "grad_norm": float(context.grad_norm or 0),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        }
        if RANK == WORLD_SIZE - 1:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"step {line['step']}: loss {value:.4f}", flush=True)


class OnTrainEnd(Callback):
    """Call a function with the trained model chunks of this rank."""

    def __init__(self, function: Callable[[list[Any]], None]) -> None:
        self.function = function

    def on_train_end(self, context: CallbackContext) -> None:
        self.function(context.model)


def run(
    config: ConfigContainer,
    options: argparse.Namespace,
    *callbacks: Callback,
    images: bool = False,
) -> None:
    """Run Megatron-Bridge's training loop, and log the losses.

    `finetune` is `pretrain` with a check that there are weights to start from. `images` selects the
    forward step for models with images.
    """
    model, batch = config.model, config.train
    summary = (
        f"{type(model).__name__}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"vocabulary {model.vocab_size}; TP{model.tensor_model_parallel_size} "
        f"PP{model.pipeline_model_parallel_size} EP{model.expert_model_parallel_size} "
        f"CP{model.context_parallel_size}, sequence {model.seq_length}, batch "
        f"{batch.micro_batch_size} / {batch.global_batch_size}, {batch.train_iters} steps"
    )
    if RANK == 0:
        print(summary)
    if options.dry_run:
        return
    check_installed(options)
    from megatron.bridge.training import gpt_step, vlm_step
    from megatron.bridge.training.finetune import finetune
    from megatron.bridge.training.pretrain import pretrain

    forward_step = vlm_step.forward_step if images else gpt_step.forward_step
    train = pretrain if config.checkpoint.pretrained_checkpoint is None else finetune
    options.save.mkdir(parents=True, exist_ok=True)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    train(config, forward_step, callbacks=[LossLogger(options.save / "losses.jsonl"), *callbacks])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
