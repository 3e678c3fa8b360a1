"""Recipes for EXAONE 4.5: 33B, and a miniature for one GPU. Arguments are those of `recipes/exaone4.py`.

`exaone45_vl_*` train on conversations with images (`common.conversations` says what their files hold), with
`megatron.bridge.training.vlm_step.forward_step` in the place of `gpt_step`'s; their names are the host's. The language
model learns, and the merger after the tower; to train the tower too, `config.model.freeze_vision_model = False`.
`exaone45_33b_*` train the language model on questions and answers in words; tower and merger are frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import ConfigContainer

from exaone_bridge.recipes.build import peft, sft

__all__ = [
    "exaone45_33b_peft_config",
    "exaone45_33b_sft_config",
    "exaone45_vl_33b_peft_config",
    "exaone45_vl_33b_sft_config",
    "exaone45_vl_tiny_peft_config",
    "exaone45_vl_tiny_sft_config",
]

HFPath = str | Path | None


def exaone45_33b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of the language model of EXAONE-4.5-33B, on words."""
    return sft("exaone45_33b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone45_33b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on the language model of EXAONE-4.5-33B, on words."""
    return peft("exaone45_33b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone45_vl_33b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of EXAONE-4.5-33B on conversations with images; without a folder its processor is downloaded."""
    return sft("exaone45_vl_33b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone45_vl_33b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on the language model of EXAONE-4.5-33B, on conversations with images."""
    return peft("exaone45_vl_33b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone45_vl_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of a miniature EXAONE 4.5 on conversations with images; only a folder has its processor."""
    return sft("exaone45_vl_tiny", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone45_vl_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = False,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on a miniature EXAONE 4.5, on conversations with images; only a folder has its processor."""
    return peft("exaone45_vl_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)
