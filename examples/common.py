"""Arguments, config and logging that the examples with recipes share."""

# ruff: noqa: I001  (exaone_bridge before megatron.bridge, which needs it without Transformer Engine)

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


import exaone_bridge  # noqa: F401  registers the models with Megatron-Bridge
from exaone_bridge.errors import BridgeError
from exaone_bridge.recipes import recipe
from exaone_bridge.recipes import training_loop
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import ConfigContainer

PLAN_FIELDS = ("tp", "pp", "vpp", "ep", "etp", "cp")
PLAN_FIELDS += ("seq_length", "micro_batch_size", "global_batch_size")
RANK = int(os.environ.get("RANK", "0"))


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
    if not options.dry_run:
        try:
            training_loop.check_installed()
        except BridgeError as error:
            sys.exit(str(error))


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
    training_loop.run_training(config, options.save, images=images, callbacks=callbacks)
