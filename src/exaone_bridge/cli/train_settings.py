"""The settings of the command `train`: arguments of a recipe, and fields of its config."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes.training_plan import PlanOverrides

__all__ = ["apply_overrides", "read_settings"]

# Megatron-Bridge's names of the plan's fields; the plan that is shown and checked has their values.
_PLAN_FIELDS = {
    "model.tensor_model_parallel_size": "tp",
    "model.pipeline_model_parallel_size": "pp",
    "model.virtual_pipeline_model_parallel_size": "vpp",
    "model.sequence_parallel": "sp",
    "model.expert_model_parallel_size": "ep",
    "model.expert_tensor_parallel_size": "etp",
    "model.context_parallel_size": "cp",
    "model.seq_length": "seq_length",
    "dataset.seq_length": "seq_length",
    "train.micro_batch_size": "micro_batch_size",
    "train.global_batch_size": "global_batch_size",
}
_BOOLEANS = {"true": True, "false": False}
_NULLS = ("null", "None")
_WHERE = "command line"


def read_settings(
    recipe: Callable[..., Any], settings: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Split settings into the recipe's arguments and overrides of Megatron-Bridge's config.

    A name with a dot is a field of the ConfigContainer. Where the recipe's plan has that field, the
    setting is the recipe's argument.

    Args:
        recipe: the function.
        settings: each `NAME=VALUE`.

    Returns:
        The arguments by their names, and overrides in Hydra's syntax. The layout's `sp` follows
        `tp`.

    Raises:
        UnsupportedConfig: a setting is malformed, or the recipe has no such argument.
    """
    # Arguments of recipes are optional text, unless their default is another value.
    known = {
        name: str | None if parameter.default is None else type(parameter.default)
        for name, parameter in inspect.signature(recipe).parameters.items()
        if name != "overrides"
    } | get_type_hints(PlanOverrides)
    arguments: dict[str, Any] = {}
    overrides = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = _PLAN_FIELDS.get(name.lstrip("+"), name)
        if "." in name or name.startswith(("+", "~")):
            overrides.append(setting)
            continue
        if not equals or not name.isidentifier():
            raise UnsupportedConfig("setting", got=setting, wanted="NAME=VALUE", where=_WHERE)
        if name not in known:
            raise UnsupportedConfig(
                name,
                got=text,
                wanted=f"an argument of {recipe.__name__}: {', '.join(sorted(known))}",
                where=_WHERE,
                remedy="fields of Megatron-Bridge's ConfigContainer have a dot in their names",
            )
        if name == "vpp" and text in _NULLS:  # as Megatron-Bridge spells it
            text = "1"
        arguments[name] = _value(name, text, known[name])
    if "tp" in arguments:
        arguments.setdefault("sp", arguments["tp"] > 1)
    return arguments, overrides


def _value(name: str, text: str, annotation: Any) -> Any:
    kinds = {annotation, *get_args(annotation)}
    if NoneType in kinds and text in _NULLS:
        return None
    if bool in kinds:
        if (found := _BOOLEANS.get(text.lower())) is None:
            raise UnsupportedConfig(name, got=text, known=("true", "false"), where=_WHERE)
        return found
    if int not in kinds:
        return text
    if not text.removeprefix("-").isdecimal():
        raise UnsupportedConfig(name, got=text, wanted="a whole number", where=_WHERE)
    return int(text)


def apply_overrides(config: Any, overrides: Sequence[str]) -> None:
    """Apply overrides to a ConfigContainer, in Megatron-Bridge's own (Hydra's) syntax.

    Megatron-Bridge ignores a field that it does not have (`+train.foo=1`) and a deletion, and
    accepts a value of any type; here they are rejected.

    Args:
        config: changed in place.
        overrides: with a dot in their names.

    Raises:
        UnsupportedConfig: an override that has no effect, or a value of another type.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from megatron.bridge.training.utils.omegaconf_utils import (
        OverridesError,
        process_config_with_overrides,
    )

    before = {override: _field(config, _name(override)) for override in overrides}
    logger = logging.getLogger("megatron.bridge.training.utils.omegaconf_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a field that it ignores is an error below
    try:
        process_config_with_overrides(config, cli_overrides=list(overrides))
    except OverridesError as error:
        wanted = f"fields of Megatron-Bridge's ConfigContainer ({' '.join(str(error).split())})"
        raise UnsupportedConfig("setting", got=[*overrides], wanted=wanted, where=_WHERE) from error
    finally:
        logger.setLevel(level)
    for parsed in OverridesParser.create().parse_overrides(overrides=list(overrides)):
        name, found = parsed.key_or_group, _field(config, parsed.key_or_group)
        if parsed.is_delete():
            wanted = "a value: a field cannot be deleted"
            raise UnsupportedConfig(
                name, got="~", wanted=wanted, where=_WHERE, remedy=f"write {name}=null"
            )
        if found is _MISSING:
            wanted = "a field of Megatron-Bridge's ConfigContainer"
            raise UnsupportedConfig(name, got=parsed.input_line, wanted=wanted, where=_WHERE)
        _check_type(name, before[str(parsed.input_line)], found)


_MISSING = object()


def _name(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _field(config: Any, name: str) -> Any:
    found = config
    for part in name.split("."):
        if isinstance(found, Mapping):
            found = found.get(part, _MISSING)
        else:
            found = getattr(found, part, _MISSING)
    return found


def _check_type(name: str, before: Any, after: Any) -> None:
    for kinds, wanted in ((bool, "true or false"), (int | float, "a number")):
        if isinstance(before, kinds) and not (after is None or isinstance(after, kinds)):
            raise UnsupportedConfig(name, got=after, wanted=wanted, where=_WHERE)
        if isinstance(before, bool):
            return
