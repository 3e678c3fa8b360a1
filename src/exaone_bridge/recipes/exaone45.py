"""Training recipes for EXAONE 4.5; see `recipes/build.py` for the arguments that recipes share.

- `exaone45_33b_*` train the language model on prompts and completions; the vision encoder and its
  merger are frozen.
- `exaone45_vl_*` train on conversations with images (`common.image_conversations` describes the
  files), with `megatron.bridge.training.vlm_step.forward_step` instead of `gpt_step`'s. They have
  the names of Megatron-Bridge's own recipes. The language model and the vision encoder's merger
  are trained; set `config.model.freeze_vision_model = False` to train the vision encoder too.
  Without `hf_path`, `exaone45_vl_33b_*` download the published processor, and `exaone45_vl_tiny_*`
  have none.
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
    "exaone45_33b_chat_peft_config",
    "exaone45_33b_chat_sft_config",
    "exaone45_33b_peft_config",
    "exaone45_33b_sft_config",
    "exaone45_vl_33b_peft_config",
    "exaone45_vl_33b_sft_config",
    "exaone45_vl_tiny_peft_config",
    "exaone45_vl_tiny_sft_config",
]


def exaone45_33b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for the language model of EXAONE 4.5 33B on text."""
    return build.sft_config("exaone45_33b", gpu_memory_gb, hf_path, dataset_root, packed, overrides)


def exaone45_33b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for the language model of EXAONE 4.5 33B on text."""
    return build.peft_config(
        "exaone45_33b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone45_33b_chat_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for full SFT of the language model of EXAONE 4.5 33B on conversations."""
    return build.chat_sft_config(
        "exaone45_33b", gpu_memory_gb, hf_path, dataset_root, packed, last_turn, overrides
    )


def exaone45_33b_chat_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = True,
    last_turn: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a config for LoRA or DoRA of the language model of EXAONE 4.5 33B on conversations."""
    return build.chat_peft_config(
        "exaone45_33b",
        peft_scheme,
        gpu_memory_gb,
        hf_path,
        dataset_root,
        packed,
        last_turn,
        overrides,
    )


def exaone45_vl_33b_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for EXAONE 4.5 33B on conversations with images."""
    return build.sft_config(
        "exaone45_vl_33b", gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone45_vl_33b_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for EXAONE 4.5 33B on conversations with images."""
    return build.peft_config(
        "exaone45_vl_33b", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone45_vl_tiny_sft_config(
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a full SFT config for a tiny EXAONE 4.5 on conversations with images."""
    return build.sft_config(
        "exaone45_vl_tiny", gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )


def exaone45_vl_tiny_peft_config(
    peft_scheme: str | PEFT = "lora",
    gpu_memory_gb: int = 80,
    hf_path: str | Path | None = None,
    dataset_root: str | Path | None = None,
    packed: bool = False,
    **overrides: Unpack[PlanOverrides],
) -> ConfigContainer:
    """Return a LoRA or DoRA config for a tiny EXAONE 4.5 on conversations with images."""
    return build.peft_config(
        "exaone45_vl_tiny", peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, overrides
    )
