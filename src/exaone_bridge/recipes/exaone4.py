"""Recipes for EXAONE 4.0: 1.2B, 32B (hybrid), and a miniature of the 32B for one GPU.

Arguments that all of them share:
    gpu_memory_gb: the GPU that the layout is sized for, 80 or 141.
    hf_path: a Hugging Face folder on disk whose configuration, tokenizer and weights are taken; None: the published
        configuration, random weights, and no tokenizer. PEFT cannot start without one.
    changes: fields of `Plan` and `Layout` to change: gpus, tp, pp, vpp, sp, cp, seq_length, micro_batch, global_batch.
Fine-tuning also takes `dataset_root` (a folder with training.jsonl and validation.jsonl) and `packed`.
All raise UnsupportedConfig, UnsupportedLayout or CheckpointError for what cannot work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import ConfigContainer

from exaone_bridge.recipes.build import peft, pretrain, sft

__all__ = [
    "exaone4_1p2b_64k_pretrain_config",
    "exaone4_1p2b_peft_config",
    "exaone4_1p2b_pretrain_config",
    "exaone4_1p2b_sft_config",
    "exaone4_32b_128k_pretrain_config",
    "exaone4_32b_peft_config",
    "exaone4_32b_pretrain_config",
    "exaone4_32b_sft_config",
    "exaone4_tiny_peft_config",
    "exaone4_tiny_pretrain_config",
    "exaone4_tiny_sft_config",
]

HFPath = str | Path | None


def exaone4_1p2b_pretrain_config(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
    """Pretraining of EXAONE-4.0-1.2B."""
    return pretrain("exaone4_1p2b", "pretrain", gpu_memory_gb, hf_path, **changes)


def exaone4_1p2b_64k_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any
) -> ConfigContainer:
    """Pretraining of EXAONE-4.0-1.2B on sequences as long as it has positions, cut by context parallelism."""
    return pretrain("exaone4_1p2b", "64k_pretrain", gpu_memory_gb, hf_path, **changes)


def exaone4_1p2b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of EXAONE-4.0-1.2B."""
    return sft("exaone4_1p2b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone4_1p2b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on EXAONE-4.0-1.2B."""
    return peft("exaone4_1p2b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone4_32b_pretrain_config(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
    """Pretraining of EXAONE-4.0-32B."""
    return pretrain("exaone4_32b", "pretrain", gpu_memory_gb, hf_path, **changes)


def exaone4_32b_128k_pretrain_config(
    gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any
) -> ConfigContainer:
    """Pretraining of EXAONE-4.0-32B on sequences as long as it has positions, cut by context parallelism."""
    return pretrain("exaone4_32b", "128k_pretrain", gpu_memory_gb, hf_path, **changes)


def exaone4_32b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of EXAONE-4.0-32B."""
    return sft("exaone4_32b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone4_32b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on EXAONE-4.0-32B."""
    return peft("exaone4_32b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone4_tiny_pretrain_config(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
    """Pretraining of a miniature EXAONE 4.0 hybrid."""
    return pretrain("exaone4_tiny", "pretrain", gpu_memory_gb, hf_path, **changes)


def exaone4_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of every parameter of a miniature EXAONE 4.0 hybrid."""
    return sft("exaone4_tiny", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone4_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on a miniature EXAONE 4.0 hybrid."""
    return peft("exaone4_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)
