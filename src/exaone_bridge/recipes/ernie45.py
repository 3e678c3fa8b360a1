"""Recipes for ERNIE 4.5: 0.3B (dense), 21B-A3B and 300B-A47B, and a miniature of the 21B for one GPU.

Arguments are those of `exaone4.py`. Pretraining balances experts by updating the selection bias, fine-tuning
leaves it alone; adapters go on attention only where there are experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import ConfigContainer

from exaone_bridge.recipes.build import peft, pretrain, sft

__all__ = [
    "ernie45_0p3b_peft_config",
    "ernie45_0p3b_pretrain_config",
    "ernie45_0p3b_sft_config",
    "ernie45_21b_a3b_peft_config",
    "ernie45_21b_a3b_pretrain_config",
    "ernie45_21b_a3b_sft_config",
    "ernie45_300b_a47b_peft_config",
    "ernie45_300b_a47b_pretrain_config",
    "ernie45_300b_a47b_sft_config",
    "ernie45_tiny_peft_config",
    "ernie45_tiny_pretrain_config",
    "ernie45_tiny_sft_config",
]

HFPath = str | Path | None


def ernie45_0p3b_pretrain_config(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
    """Pretraining of ERNIE-4.5-0.3B."""
    return pretrain("ernie45_0p3b", "pretrain", gpu_memory_gb, hf_path, **changes)


def ernie45_0p3b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of ERNIE-4.5-0.3B."""
    return sft("ernie45_0p3b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_0p3b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on ERNIE-4.5-0.3B."""
    return peft("ernie45_0p3b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_21b_a3b_pretrain_config(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
    """Pretraining of ERNIE-4.5-21B-A3B."""
    return pretrain("ernie45_21b_a3b", "pretrain", gpu_memory_gb, hf_path, **changes)


def ernie45_21b_a3b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of ERNIE-4.5-21B-A3B."""
    return sft("ernie45_21b_a3b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_21b_a3b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on ERNIE-4.5-21B-A3B."""
    return peft("ernie45_21b_a3b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_300b_a47b_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any
) -> ConfigContainer:
    """Pretraining of ERNIE-4.5-300B-A47B."""
    return pretrain("ernie45_300b_a47b", "pretrain", gpu_memory_gb, hf_path, **changes)


def ernie45_300b_a47b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of ERNIE-4.5-300B-A47B."""
    return sft("ernie45_300b_a47b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_300b_a47b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on ERNIE-4.5-300B-A47B."""
    return peft("ernie45_300b_a47b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_tiny_pretrain_config(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
    """Pretraining of a miniature ERNIE 4.5 mixture of experts."""
    return pretrain("ernie45_tiny", "pretrain", gpu_memory_gb, hf_path, **changes)


def ernie45_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of a miniature ERNIE 4.5 mixture of experts."""
    return sft("ernie45_tiny", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def ernie45_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on a miniature ERNIE 4.5 mixture of experts."""
    return peft("ernie45_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)
