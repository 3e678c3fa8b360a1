"""The command `train`: runs a recipe in Megatron-Bridge's training loop, or shows its plan."""

from __future__ import annotations

import contextlib
import inspect
import os
from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.megatron.run_config import read_run_config, read_section
from exaone_bridge.cli.show import quiet, say, table
from exaone_bridge.cli.train_settings import apply_overrides, read_settings
from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout
from exaone_bridge.patches.blend import check_blend
from exaone_bridge.recipes import recipe
from exaone_bridge.recipes.build import config_file
from exaone_bridge.recipes.checked_plan import CheckedPlan, check_plan
from exaone_bridge.recipes.memory import GB
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.rows import CONVERSATIONS, PROMPTS, check_rows
from exaone_bridge.recipes.training_plans import plan_of_recipe
from exaone_bridge.runtime.launch import is_rank_zero
from exaone_bridge.schema.iterations import is_megatron_checkpoint, iteration_folder
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["train"]

# Fields of the plan that --dry-run shows where they are set.
_OVERLAP = (
    "fuse_weight_gradients",
    "tp_overlap",
    "shared_expert_overlap",
    "cp_full_attention",
    "cp_sliding_window",
)


def train(options: Namespace) -> None:
    """Run a recipe, or show its plan; the options are those that `cli.arguments` defines.

    Raises:
        UnsupportedConfig: an unknown recipe or setting, or a machine that cannot train.
        UnsupportedLayout: the plan does not fit the model, the GPUs or their memory, or a run that
            it would resume.
        CheckpointError: `hf_path` has no config.json.
    """
    arguments, overrides = read_settings(recipe(options.recipe), options.settings)
    _set_gpus(arguments, options)
    plan = _plan(options.recipe, arguments)
    if is_rank_zero():
        _show(options.recipe, plan, arguments)
    if options.dry_run and not overrides:
        return
    if options.dry_run:
        quiet()
    else:
        _check_can_run(options, arguments)
    for variable, value in plan.plan.environment.items():  # before CUDA starts
        os.environ.setdefault(variable, str(value))
    config = _config(options, arguments, overrides)
    if config.checkpoint.load is not None and config.checkpoint.load_optim:
        _check_resumes(Path(config.checkpoint.load), plan.plan.layout)
    if options.dry_run:
        _validate(config, plan.plan.gpus)
        say("The settings of Megatron-Bridge's ConfigContainer are accepted; nothing was run.")
        return
    if config.logger.wandb_project and find_spec("wandb") is None:
        raise UnsupportedConfig(
            "logger.wandb_project",
            got=config.logger.wandb_project,
            wanted="null where wandb is not installed",
            where="command line",
            remedy="run `pip install wandb`",
        )
    from exaone_bridge.recipes.training_loop import run_training

    run_training(config, options.save, images="_vl_" in options.recipe, quiet=not options.verbose)
    if is_rank_zero():
        say(f"{options.save}: checkpoints, losses.jsonl, loss.svg and TensorBoard's events")


def _set_gpus(arguments: dict[str, Any], options: Namespace) -> None:
    """Set the number of GPUs: that of torchrun's ranks; without torchrun, one for a run."""
    if "WORLD_SIZE" not in os.environ and options.dry_run:
        return
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if (gpus := arguments.setdefault("gpus", ranks)) != ranks:
        raise UnsupportedLayout(
            "gpus",
            got=gpus,
            wanted=f"the number of processes, {ranks}",
            remedy=f"start it with `torchrun --nproc-per-node {gpus} -m exaone_bridge train`",
        )


def _plan(name: str, arguments: dict[str, Any]) -> CheckedPlan:
    """Find the plan of a recipe without Megatron."""
    model, stage, plan = plan_of_recipe(name, arguments)
    hf_config = CONFIGS[model]
    if (folder := arguments.get("hf_path")) is not None:
        hf_config = read_json(config_file(folder))
    if (rows := arguments.get("dataset_root")) is not None:
        check_rows(rows, CONVERSATIONS if "_chat_" in name or "_vl_" in name else PROMPTS)
    packed = arguments.get("packed", _default(name, "packed"))
    memory = arguments.get("gpu_memory_gb", 80)
    return check_plan(model, stage, memory, hf_config, plan, packed)


def _default(name: str, argument: str) -> Any:
    """Return the default of a recipe's argument; False: the recipe has no such argument."""
    parameter = inspect.signature(recipe(name)).parameters.get(argument)
    return parameter is not None and parameter.default


def _show(name: str, checked: CheckedPlan, arguments: dict[str, Any]) -> None:
    plan, memory = checked.plan, checked.memory
    tokens = plan.seq_length * plan.global_batch_size
    further = ", ".join(
        name if value is True else f"{name}={value}"
        for name in _OVERLAP
        if (value := getattr(plan, name))
    )
    parts = ("parameters", "gradients", "optimizer", "activations", "graphs")
    sizes = ", ".join(
        f"{part} {size / GB:.1f}" for part in parts if (size := getattr(memory, part))
    )
    rows = [
        ["model", checked.model.family.name],
        *([key, value] for key, value in plan.table_row().items() if value != "-"),
        ["microbatches a step", str(plan.num_microbatches)],
        *([["precision", plan.precision]] if plan.precision != "bf16" else []),
        *([["overlap and fusion", further]] if further else []),
        *([["CUDA graphs", str(checked.graphs)]] if plan.cuda_graphs != "off" else []),
        ["tokens a step", f"{tokens:,}, {tokens // plan.gpus:,} per GPU"],
        [
            "memory of a GPU",
            f"{memory.total / GB:.1f} of {arguments.get('gpu_memory_gb', 80)} GB, estimated",
        ],
        ["of it, GB", sizes],
    ]
    table(name, ["plan", "value"], rows)


def _check_can_run(options: Namespace, arguments: dict[str, Any]) -> None:
    """Check what a run needs and a dry run does not."""
    if options.save is None:
        wanted = "a folder for checkpoints and logs"
        raise UnsupportedConfig("--save", got=None, wanted=wanted, where="command line")
    if "_pretrain_" not in options.recipe and arguments.get("hf_path") is None:
        raise UnsupportedConfig(
            "hf_path",
            got=None,
            wanted="a Hugging Face directory, whose tokenizer and weights fine-tuning starts from",
            where="command line",
        )


def _config(options: Namespace, arguments: dict[str, Any], overrides: list[str]) -> Any:
    """Build the ConfigContainer: the recipe's, with output folders, then the overrides."""
    config = recipe(options.recipe)(**arguments)
    if options.save is not None:
        checkpoints = str(options.save / "checkpoints")
        config.checkpoint.save = config.checkpoint.load = checkpoints  # a new run resumes
        config.logger.tensorboard_dir = str(options.save / "tensorboard")
        config.logger.wandb_exp_name = options.save.absolute().name  # without one it raises
    warmup = config.scheduler.lr_warmup_iters
    apply_overrides(config, overrides)
    check_blend(config.dataset)
    steps = config.scheduler.lr_decay_iters or config.train.train_iters
    if steps and config.scheduler.lr_warmup_iters == warmup > steps // 10:
        config.scheduler.lr_warmup_iters = steps // 10
        if is_rank_zero():
            say(f"The learning rate warms up for {steps // 10} of {steps} steps.")
    return config


def _check_resumes(folder: Path, layout: Layout) -> None:
    """Reject the resumption of a run whose optimizer is saved for another layout.

    Megatron-Bridge 0.6.2 raises in the middle of its start, with another remedy
    (`training/checkpointing.py`, `load_checkpoint`).
    """
    if not is_megatron_checkpoint(folder):
        return
    iteration = iteration_folder(folder)
    saved = read_run_config(iteration, adapter=True).layout
    names = ("tp", "pp", "vpp", "ep", "expert_tp")
    same = all(getattr(saved, name) == getattr(layout, name) for name in names)
    checkpoint = read_section(iteration, "checkpoint") or {}
    if same or not checkpoint.get("save_optim", True):
        return
    if checkpoint.get("dist_ckpt_optim_fully_reshardable"):
        return
    raise UnsupportedLayout(
        "the layout",
        got=str(layout),
        wanted=f"{saved}, at which {iteration} saved the optimizer's state",
        remedy="resume at that layout, start in another --save folder, or leave the state out "
        "(checkpoint.load_optim=false)",
    )


def _validate(config: Any, gpus: int) -> None:
    """Run Megatron-Bridge's own validation for this number of GPUs; it changes the config."""
    from megatron.bridge.training.config import runtime_config_update

    try:
        with _world_size(gpus):
            runtime_config_update(config)
    except (AssertionError, TypeError, ValueError) as error:
        raise UnsupportedConfig(
            "ConfigContainer",
            got="not valid",
            wanted=f"what Megatron-Bridge accepts ({' '.join(str(error).split())})",
            where="command line",
        ) from error


@contextlib.contextmanager
def _world_size(gpus: int) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["WORLD_SIZE"] = str(gpus)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
