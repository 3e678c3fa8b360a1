"""Recipes for EXAONE 4.5: 33B. Arguments are those of `recipes/exaone4.py`.

Their data are questions and answers in words, and the tower and its merger are frozen. For images set `config.dataset`
to one of the host's for models with images, take its `vlm_step`, and let the merger learn
(`config.model.freeze_vision_projection = False`); `examples/images.py` is such a run, written out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import ConfigContainer

from exaone_bridge.recipes.build import peft, sft

__all__ = ["exaone45_33b_peft_config", "exaone45_33b_sft_config"]

HFPath = str | Path | None


def exaone45_33b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """Fine-tuning of the language model of EXAONE-4.5-33B."""
    return sft("exaone45_33b", gpu_memory_gb, hf_path, dataset_root, packed, **changes)


def exaone45_33b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: HFPath = None,
    dataset_root: HFPath = None,
    packed: bool = True,
    **changes: Any,
) -> ConfigContainer:
    """LoRA or DoRA on the language model of EXAONE-4.5-33B."""
    return peft("exaone45_33b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes)
