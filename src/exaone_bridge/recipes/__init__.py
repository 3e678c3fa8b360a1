"""Recipes: functions that return Megatron-Bridge's ConfigContainer, sized for 80 GB and 141 GB GPUs.

    from exaone_bridge.recipes import exaone4_1p2b_pretrain_config
    config = exaone4_1p2b_pretrain_config(gpu_memory_gb=141)
    megatron.bridge.training.pretrain.pretrain(config, forward_step)

`docs/recipes.md` holds the table of their layouts. Importing this package imports Megatron-Bridge only when a recipe is
asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from exaone_bridge.recipes.plans import PLANS

__all__ = ["RECIPES", "recipe"]

# Name -> (model, stage).
RECIPES: dict[str, tuple[str, str]] = {
    f"{model}_{stage}_config": (model, stage) for model, stage in PLANS
}


@functools.cache
def recipe(name: str) -> Callable[..., Any]:
    """The recipe of that name.

    Raises:
        UnsupportedConfig: there is none; the message lists them.
    """
    from exaone_bridge.errors import UnsupportedConfig

    if name not in RECIPES:
        raise UnsupportedConfig("recipe", got=name, known=sorted(RECIPES), where="recipes")
    from exaone_bridge.recipes.functions import function_of

    return function_of(name, *RECIPES[name])


def __getattr__(name: str) -> Any:
    if name in RECIPES:
        return recipe(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
