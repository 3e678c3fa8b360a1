"""The command `train`: runs a recipe in Megatron-Bridge's training loop, or shows its plan."""

from __future__ import annotations

import inspect
import json
import os
from argparse import Namespace
from typing import Any

from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.cli.show import say, table
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes import recipe
from exaone_bridge.recipes.build import CheckedPlan, check_plan, config_file
from exaone_bridge.recipes.memory import GB
from exaone_bridge.recipes.published import CONFIGS
from exaone_bridge.recipes.training_plans import TRAINING_PLANS, training_plan
from exaone_bridge.runtime.launch import is_rank_zero

__all__ = ["parse_settings", "train"]

# Arguments of recipes that are not fields of the plan.
_ARGUMENTS = ("gpu_memory_gb", "hf_path", "dataset_root", "packed", "last_turn", "peft_scheme")


def train(options: Namespace) -> None:
    """Run a recipe, or show its plan; the options are those that `cli.arguments` defines.

    Raises:
        UnsupportedConfig: an unknown recipe or setting, or a machine that cannot train.
        UnsupportedLayout: the plan does not fit the model, the GPUs or their memory.
        CheckpointError: `hf_path` has no config.json.
    """
    arguments, overrides = parse_settings(options.settings)
    if "WORLD_SIZE" in os.environ:
        arguments["gpus"] = int(os.environ["WORLD_SIZE"])
    plan = _plan(options.recipe, arguments)
    if is_rank_zero():
        _show(options.recipe, plan, arguments)
    if options.dry_run and not overrides:
        return
    if options.save is None and not options.dry_run:
        wanted = "a folder for checkpoints and logs"
        raise UnsupportedConfig("--save", got=None, wanted=wanted, where="command line")
    for variable, value in plan.plan.environment.items():  # before CUDA starts
        os.environ.setdefault(variable, str(value))
    config = _config(options, arguments, overrides)
    if options.dry_run:
        say("The settings of Megatron-Bridge's ConfigContainer are accepted; nothing was run.")
        return
    from exaone_bridge.recipes.training_loop import run_training

    run_training(config, options.save, images="_vl_" in options.recipe, quiet=not options.verbose)
    if is_rank_zero():
        say(f"{options.save}: checkpoints, losses.jsonl, loss.svg and TensorBoard's events")


def parse_settings(settings: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split settings into the recipe's arguments and Megatron-Bridge's overrides, which have dots.

    The layout's `sp` follows `tp`.

    Raises:
        UnsupportedConfig: a setting is not NAME=VALUE.
    """
    arguments: dict[str, Any] = {}
    overrides = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if "." in name or name.startswith(("+", "~")):
            overrides.append(setting)
            continue
        if not equals or not name.isidentifier():
            wanted = "NAME=VALUE"
            raise UnsupportedConfig("setting", got=setting, wanted=wanted, where="command line")
        try:
            arguments[name] = json.loads(
                text.lower() if text in ("True", "False", "None") else text
            )
        except json.JSONDecodeError:
            arguments[name] = None if text == "None" else text
    if "tp" in arguments:
        arguments.setdefault("sp", arguments["tp"] > 1)
    return arguments, overrides


def _plan(name: str, arguments: dict[str, Any]) -> CheckedPlan:
    """Find the plan of a recipe without Megatron."""
    recipe(name)
    known = {f"{model}_{stage}_config": (model, stage) for model, stage in TRAINING_PLANS}
    model, stage = known[name if name in known else name.replace("_chat", "")]
    memory = arguments.get("gpu_memory_gb", 80)
    fields = {key: value for key, value in arguments.items() if key not in _ARGUMENTS}
    plan = training_plan(model, stage, memory).with_overrides(**fields)
    packed = arguments.get("packed", _default(name, "packed"))
    hf_config = CONFIGS[model]
    if (folder := arguments.get("hf_path")) is not None:
        hf_config = read_json(config_file(folder))
    return check_plan(model, stage, memory, hf_config, plan, packed)


def _default(name: str, argument: str) -> Any:
    """Return the default of a recipe's argument; False: the recipe has no such argument."""
    parameter = inspect.signature(recipe(name)).parameters.get(argument)
    return parameter is not None and parameter.default


def _show(name: str, checked: CheckedPlan, arguments: dict[str, Any]) -> None:
    plan, memory = checked.plan, checked.memory
    tokens = plan.seq_length * plan.global_batch_size
    parts = ("parameters", "gradients", "optimizer", "activations", "graphs")
    sizes = ", ".join(
        f"{part} {size / GB:.1f}" for part in parts if (size := getattr(memory, part))
    )
    rows = [
        ["model", checked.model.family.name],
        *([key, value] for key, value in plan.table_row().items() if value != "-"),
        ["microbatches a step", str(plan.num_microbatches)],
        *([["precision", plan.precision]] if plan.precision != "bf16" else []),
        *([["CUDA graphs", str(checked.graphs)]] if plan.cuda_graphs != "off" else []),
        ["tokens a step", f"{tokens:,}, {tokens // plan.gpus:,} per GPU"],
        [
            "memory of a GPU",
            f"{memory.total / GB:.1f} of {arguments.get('gpu_memory_gb', 80)} GB, estimated",
        ],
        ["of it, GB", sizes],
    ]
    table(name, ["plan", "value"], rows)


def _config(options: Namespace, arguments: dict[str, Any], overrides: list[str]) -> Any:
    """Build the ConfigContainer: the recipe's, with output folders, then the overrides."""
    from megatron.bridge.training.utils.omegaconf_utils import (
        OverridesError,
        process_config_with_overrides,
    )

    config = recipe(options.recipe)(**arguments)
    if options.save is not None:
        checkpoints = str(options.save / "checkpoints")
        config.checkpoint.save = config.checkpoint.load = checkpoints  # a new run resumes
        config.logger.tensorboard_dir = str(options.save / "tensorboard")
    try:
        return process_config_with_overrides(config, cli_overrides=overrides)
    except OverridesError as error:
        text = " ".join(str(error).split())
        raise UnsupportedConfig(
            "setting",
            got=overrides,
            wanted=f"fields of Megatron-Bridge's ConfigContainer ({text})",
            where="command line",
        ) from error
