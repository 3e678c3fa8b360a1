"""Training recipes: functions that return a ConfigContainer, sized for 80 GB and 141 GB GPUs.

    from exaone_bridge.recipes import exaone4_1p2b_pretrain_config
    config = exaone4_1p2b_pretrain_config(gpu_memory_gb=141)
    megatron.bridge.training.pretrain.pretrain(config, forward_step)

docs/recipes.md has the table of their parallel layouts. Importing this package imports neither
torch nor Megatron-Bridge; calling a recipe does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes.ernie45 import (
    ernie45_0p3b_chat_peft_config,
    ernie45_0p3b_chat_sft_config,
    ernie45_0p3b_peft_config,
    ernie45_0p3b_pretrain_config,
    ernie45_0p3b_sft_config,
    ernie45_21b_a3b_chat_peft_config,
    ernie45_21b_a3b_chat_sft_config,
    ernie45_21b_a3b_peft_config,
    ernie45_21b_a3b_pretrain_config,
    ernie45_21b_a3b_sft_config,
    ernie45_300b_a47b_chat_peft_config,
    ernie45_300b_a47b_chat_sft_config,
    ernie45_300b_a47b_peft_config,
    ernie45_300b_a47b_pretrain_config,
    ernie45_300b_a47b_sft_config,
    ernie45_tiny_chat_peft_config,
    ernie45_tiny_chat_sft_config,
    ernie45_tiny_peft_config,
    ernie45_tiny_pretrain_config,
    ernie45_tiny_sft_config,
)
from exaone_bridge.recipes.exaone4 import (
    exaone4_1p2b_64k_pretrain_config,
    exaone4_1p2b_chat_peft_config,
    exaone4_1p2b_chat_sft_config,
    exaone4_1p2b_peft_config,
    exaone4_1p2b_pretrain_config,
    exaone4_1p2b_sft_config,
    exaone4_32b_128k_pretrain_config,
    exaone4_32b_chat_peft_config,
    exaone4_32b_chat_sft_config,
    exaone4_32b_peft_config,
    exaone4_32b_pretrain_config,
    exaone4_32b_sft_config,
    exaone4_tiny_chat_peft_config,
    exaone4_tiny_chat_sft_config,
    exaone4_tiny_peft_config,
    exaone4_tiny_pretrain_config,
    exaone4_tiny_sft_config,
)
from exaone_bridge.recipes.exaone45 import (
    exaone45_33b_chat_peft_config,
    exaone45_33b_chat_sft_config,
    exaone45_33b_peft_config,
    exaone45_33b_sft_config,
    exaone45_vl_33b_peft_config,
    exaone45_vl_33b_sft_config,
    exaone45_vl_tiny_peft_config,
    exaone45_vl_tiny_sft_config,
)
from exaone_bridge.recipes.exaone_moe import (
    k_exaone_2_750b_a37b_chat_peft_config,
    k_exaone_2_750b_a37b_peft_config,
    k_exaone_236b_a23b_chat_peft_config,
    k_exaone_236b_a23b_chat_sft_config,
    k_exaone_236b_a23b_peft_config,
    k_exaone_236b_a23b_pretrain_config,
    k_exaone_236b_a23b_sft_config,
    k_exaone_tiny_chat_peft_config,
    k_exaone_tiny_chat_sft_config,
    k_exaone_tiny_peft_config,
    k_exaone_tiny_pretrain_config,
    k_exaone_tiny_sft_config,
)

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

__all__ = [
    "RECIPES",
    "ernie45_0p3b_chat_peft_config",
    "ernie45_0p3b_chat_sft_config",
    "ernie45_0p3b_peft_config",
    "ernie45_0p3b_pretrain_config",
    "ernie45_0p3b_sft_config",
    "ernie45_21b_a3b_chat_peft_config",
    "ernie45_21b_a3b_chat_sft_config",
    "ernie45_21b_a3b_peft_config",
    "ernie45_21b_a3b_pretrain_config",
    "ernie45_21b_a3b_sft_config",
    "ernie45_300b_a47b_chat_peft_config",
    "ernie45_300b_a47b_chat_sft_config",
    "ernie45_300b_a47b_peft_config",
    "ernie45_300b_a47b_pretrain_config",
    "ernie45_300b_a47b_sft_config",
    "ernie45_tiny_chat_peft_config",
    "ernie45_tiny_chat_sft_config",
    "ernie45_tiny_peft_config",
    "ernie45_tiny_pretrain_config",
    "ernie45_tiny_sft_config",
    "exaone4_1p2b_64k_pretrain_config",
    "exaone4_1p2b_chat_peft_config",
    "exaone4_1p2b_chat_sft_config",
    "exaone4_1p2b_peft_config",
    "exaone4_1p2b_pretrain_config",
    "exaone4_1p2b_sft_config",
    "exaone4_32b_128k_pretrain_config",
    "exaone4_32b_chat_peft_config",
    "exaone4_32b_chat_sft_config",
    "exaone4_32b_peft_config",
    "exaone4_32b_pretrain_config",
    "exaone4_32b_sft_config",
    "exaone4_tiny_chat_peft_config",
    "exaone4_tiny_chat_sft_config",
    "exaone4_tiny_peft_config",
    "exaone4_tiny_pretrain_config",
    "exaone4_tiny_sft_config",
    "exaone45_33b_chat_peft_config",
    "exaone45_33b_chat_sft_config",
    "exaone45_33b_peft_config",
    "exaone45_33b_sft_config",
    "exaone45_vl_33b_peft_config",
    "exaone45_vl_33b_sft_config",
    "exaone45_vl_tiny_peft_config",
    "exaone45_vl_tiny_sft_config",
    "k_exaone_2_750b_a37b_chat_peft_config",
    "k_exaone_2_750b_a37b_peft_config",
    "k_exaone_236b_a23b_chat_peft_config",
    "k_exaone_236b_a23b_chat_sft_config",
    "k_exaone_236b_a23b_peft_config",
    "k_exaone_236b_a23b_pretrain_config",
    "k_exaone_236b_a23b_sft_config",
    "k_exaone_tiny_chat_peft_config",
    "k_exaone_tiny_chat_sft_config",
    "k_exaone_tiny_peft_config",
    "k_exaone_tiny_pretrain_config",
    "k_exaone_tiny_sft_config",
    "recipe",
]

RECIPES: dict[str, Callable[..., ConfigContainer]] = {
    function.__name__: function
    for function in (
        exaone4_1p2b_pretrain_config,
        exaone4_1p2b_64k_pretrain_config,
        exaone4_1p2b_sft_config,
        exaone4_1p2b_peft_config,
        exaone4_32b_pretrain_config,
        exaone4_32b_128k_pretrain_config,
        exaone4_32b_sft_config,
        exaone4_32b_peft_config,
        exaone4_tiny_pretrain_config,
        exaone4_tiny_sft_config,
        exaone4_tiny_peft_config,
        exaone45_33b_sft_config,
        exaone45_33b_peft_config,
        exaone45_vl_33b_sft_config,
        exaone45_vl_33b_peft_config,
        exaone45_vl_tiny_sft_config,
        exaone45_vl_tiny_peft_config,
        ernie45_0p3b_pretrain_config,
        ernie45_0p3b_sft_config,
        ernie45_0p3b_peft_config,
        ernie45_21b_a3b_pretrain_config,
        ernie45_21b_a3b_sft_config,
        ernie45_21b_a3b_peft_config,
        ernie45_300b_a47b_pretrain_config,
        ernie45_300b_a47b_sft_config,
        ernie45_300b_a47b_peft_config,
        ernie45_tiny_pretrain_config,
        ernie45_tiny_sft_config,
        ernie45_tiny_peft_config,
        k_exaone_236b_a23b_pretrain_config,
        k_exaone_236b_a23b_sft_config,
        k_exaone_236b_a23b_peft_config,
        k_exaone_2_750b_a37b_peft_config,
        k_exaone_tiny_pretrain_config,
        k_exaone_tiny_sft_config,
        k_exaone_tiny_peft_config,
        exaone4_1p2b_chat_sft_config,
        exaone4_1p2b_chat_peft_config,
        exaone4_32b_chat_sft_config,
        exaone4_32b_chat_peft_config,
        exaone4_tiny_chat_sft_config,
        exaone4_tiny_chat_peft_config,
        exaone45_33b_chat_sft_config,
        exaone45_33b_chat_peft_config,
        ernie45_0p3b_chat_sft_config,
        ernie45_0p3b_chat_peft_config,
        ernie45_21b_a3b_chat_sft_config,
        ernie45_21b_a3b_chat_peft_config,
        ernie45_300b_a47b_chat_sft_config,
        ernie45_300b_a47b_chat_peft_config,
        ernie45_tiny_chat_sft_config,
        ernie45_tiny_chat_peft_config,
        k_exaone_236b_a23b_chat_sft_config,
        k_exaone_236b_a23b_chat_peft_config,
        k_exaone_2_750b_a37b_chat_peft_config,
        k_exaone_tiny_chat_sft_config,
        k_exaone_tiny_chat_peft_config,
    )
}


def recipe(name: str) -> Callable[..., ConfigContainer]:
    """Look up a recipe by its name, for example from a command line.

    Raises:
        UnsupportedConfig: there is no such recipe; the message lists similar names, or all.
    """
    if name not in RECIPES:
        import difflib  # imported late, for the error only

        close = difflib.get_close_matches(name, RECIPES, n=5)
        known = close or sorted(RECIPES)
        raise UnsupportedConfig("recipe", got=name, known=known, where="recipes")
    return RECIPES[name]
