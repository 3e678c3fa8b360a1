"""Training recipes for K-EXAONE; see `recipes/build.py` for the arguments that recipes share.

Pretraining balances experts as the technical report has it (arXiv 2601.01739): the selection bias
is updated, and a sequence-level auxiliary loss is added. Fine-tuning does neither. Adapters are on
attention only. K-EXAONE 2.0 has no pretraining recipe: its layer order and limits come from the
config.json of `hf_path`.
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
]


def k_exaone_236b_a23b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for K-EXAONE 236B-A23B."""
    return build.pretrain_config(
        "k_exaone_236b_a23b", "pretrain", gpu_memory_gb, hf_path, overrides
    )


def k_exaone_236b_a23b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for K-EXAONE 236B-A23B."""
    return build.sft_config(
        "k_exaone_236b_a23b", gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def k_exaone_236b_a23b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for K-EXAONE 236B-A23B."""
    return build.peft_config(
        "k_exaone_236b_a23b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def k_exaone_236b_a23b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of K-EXAONE 236B-A23B on conversations."""
    return build.chat_sft_config(
        "k_exaone_236b_a23b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def k_exaone_236b_a23b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of K-EXAONE 236B-A23B on conversations."""
    return build.chat_peft_config(
        "k_exaone_236b_a23b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def k_exaone_2_750b_a37b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for K-EXAONE 2.0 750B-A37B."""
    return build.peft_config(
        "k_exaone_2_750b_a37b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def k_exaone_2_750b_a37b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of K-EXAONE 2.0 750B-A37B on conversations."""
    return build.chat_peft_config(
        "k_exaone_2_750b_a37b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def k_exaone_tiny_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: str | Path | None = None, **overrides: Unpack[PlanOverrides]
) -> ConfigContainer:
    """Return a pretraining config for a tiny EXAONE MoE model."""
    return build.pretrain_config("k_exaone_tiny", "pretrain", gpu_memory_gb, hf_path, overrides)


def k_exaone_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for a tiny EXAONE MoE model."""
    return build.sft_config(
        "k_exaone_tiny", gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def k_exaone_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for a tiny EXAONE MoE model."""
    return build.peft_config(
        "k_exaone_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def k_exaone_tiny_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of a tiny K-EXAONE on conversations."""
    return build.chat_sft_config(
        "k_exaone_tiny", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def k_exaone_tiny_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of a tiny K-EXAONE on conversations."""
    return build.chat_peft_config(
        "k_exaone_tiny",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )
