"""Training recipes for ERNIE 4.5; see `recipes/build.py` for the arguments that recipes share.

Pretraining balances experts by updating the selection bias; fine-tuning leaves the bias unchanged.
Models with experts have adapters on attention only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from exaone_bridge.recipes import build
from exaone_bridge.recipes.training_plan import PlanOverrides

if TYPE_CHECKING:
    from megatron.bridge.peft.base import PEFT
    from megatron.bridge.training.config import ConfigContainer

__all__ = [
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
]


def ernie45_0p3b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for ERNIE 4.5 0.3B."""
    return build.pretrain_config("ernie45_0p3b", "pretrain", gpu_memory_gb, hf_path, overrides)


def ernie45_0p3b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for ERNIE 4.5 0.3B."""
    return build.sft_config("ernie45_0p3b", gpu_memory_gb, hf_path, dataset_root, packed, overrides)


def ernie45_0p3b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for ERNIE 4.5 0.3B."""
    return build.peft_config(
        "ernie45_0p3b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def ernie45_0p3b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of ERNIE 4.5 0.3B on conversations."""
    return build.chat_sft_config(
        "ernie45_0p3b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def ernie45_0p3b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of ERNIE 4.5 0.3B on conversations."""
    return build.chat_peft_config(
        "ernie45_0p3b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def ernie45_21b_a3b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for ERNIE 4.5 21B-A3B."""
    return build.pretrain_config("ernie45_21b_a3b", "pretrain", gpu_memory_gb, hf_path, overrides)


def ernie45_21b_a3b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for ERNIE 4.5 21B-A3B."""
    return build.sft_config(
        "ernie45_21b_a3b", gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def ernie45_21b_a3b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for ERNIE 4.5 21B-A3B."""
    return build.peft_config(
        "ernie45_21b_a3b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def ernie45_21b_a3b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of ERNIE 4.5 21B-A3B on conversations."""
    return build.chat_sft_config(
        "ernie45_21b_a3b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def ernie45_21b_a3b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of ERNIE 4.5 21B-A3B on conversations."""
    return build.chat_peft_config(
        "ernie45_21b_a3b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def ernie45_300b_a47b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for ERNIE 4.5 300B-A47B."""
    return build.pretrain_config("ernie45_300b_a47b", "pretrain", gpu_memory_gb, hf_path, overrides)


def ernie45_300b_a47b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for ERNIE 4.5 300B-A47B."""
    return build.sft_config(
        "ernie45_300b_a47b", gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def ernie45_300b_a47b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for ERNIE 4.5 300B-A47B."""
    return build.peft_config(
        "ernie45_300b_a47b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def ernie45_300b_a47b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of ERNIE 4.5 300B-A47B on conversations."""
    return build.chat_sft_config(
        "ernie45_300b_a47b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def ernie45_300b_a47b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of ERNIE 4.5 300B-A47B on conversations."""
    return build.chat_peft_config(
        "ernie45_300b_a47b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def ernie45_tiny_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for a tiny ERNIE 4.5 with experts."""
    return build.pretrain_config("ernie45_tiny", "pretrain", gpu_memory_gb, hf_path, overrides)


def ernie45_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for a tiny ERNIE 4.5 with experts."""
    return build.sft_config("ernie45_tiny", gpu_memory_gb, hf_path, dataset_root, packed, overrides)


def ernie45_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for a tiny ERNIE 4.5 with experts."""
    return build.peft_config(
        "ernie45_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def ernie45_tiny_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of a tiny ERNIE 4.5 MoE on conversations."""
    return build.chat_sft_config(
        "ernie45_tiny", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def ernie45_tiny_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of a tiny ERNIE 4.5 MoE on conversations."""
    return build.chat_peft_config(
        "ernie45_tiny",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )
