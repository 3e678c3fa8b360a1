"""Training recipes for EXAONE 4.0; see `recipes/build.py` for the arguments that recipes share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from exaone_bridge.recipes import build
from exaone_bridge.recipes.training_plan import PlanOverrides

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.config import ConfigContainer

__all__ = [
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
]


def exaone4_1p2b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for EXAONE 4.0 1.2B."""
    return build.pretrain_config("exaone4_1p2b", "pretrain", gpu_memory_gb, hf_path, overrides)


def exaone4_1p2b_64k_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for EXAONE 4.0 1.2B at its full 65,536 positions."""
    return build.pretrain_config("exaone4_1p2b", "64k_pretrain", gpu_memory_gb, hf_path, overrides)


def exaone4_1p2b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for EXAONE 4.0 1.2B."""
    return build.sft_config("exaone4_1p2b", gpu_memory_gb, hf_path, dataset_root, packed, overrides)


def exaone4_1p2b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for EXAONE 4.0 1.2B."""
    return build.peft_config(
        "exaone4_1p2b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone4_1p2b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of EXAONE 4.0 1.2B on conversations."""
    return build.chat_sft_config(
        "exaone4_1p2b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def exaone4_1p2b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of EXAONE 4.0 1.2B on conversations."""
    return build.chat_peft_config(
        "exaone4_1p2b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def exaone4_32b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for EXAONE 4.0 32B."""
    return build.pretrain_config("exaone4_32b", "pretrain", gpu_memory_gb, hf_path, overrides)


def exaone4_32b_128k_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for EXAONE 4.0 32B at its full 131,072 positions."""
    return build.pretrain_config("exaone4_32b", "128k_pretrain", gpu_memory_gb, hf_path, overrides)


def exaone4_32b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for EXAONE 4.0 32B."""
    return build.sft_config("exaone4_32b", gpu_memory_gb, hf_path, dataset_root, packed, overrides)


def exaone4_32b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for EXAONE 4.0 32B."""
    return build.peft_config(
        "exaone4_32b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone4_32b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of EXAONE 4.0 32B on conversations."""
    return build.chat_sft_config(
        "exaone4_32b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def exaone4_32b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of EXAONE 4.0 32B on conversations."""
    return build.chat_peft_config(
        "exaone4_32b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def exaone4_tiny_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for a tiny EXAONE 4.0 hybrid."""
    return build.pretrain_config("exaone4_tiny", "pretrain", gpu_memory_gb, hf_path, overrides)


def exaone4_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for a tiny EXAONE 4.0 hybrid."""
    return build.sft_config("exaone4_tiny", gpu_memory_gb, hf_path, dataset_root, packed, overrides)


def exaone4_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for a tiny EXAONE 4.0 hybrid."""
    return build.peft_config(
        "exaone4_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone4_tiny_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of a tiny EXAONE 4.0 hybrid on conversations."""
    return build.chat_sft_config(
        "exaone4_tiny", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def exaone4_tiny_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of a tiny EXAONE 4.0 hybrid on conversations."""
    return build.chat_peft_config(
        "exaone4_tiny",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )
