"""The recipes as functions: one for each plan, named by the model and the stage of training.

Arguments that all of them share:
    gpu_memory_gb: the GPU that the layout is sized for, 80 or 141.
    hf_path: a Hugging Face folder on disk whose configuration, tokenizer and weights are taken; None: the published
        configuration, random weights, and no tokenizer. PEFT cannot start without one.
    changes: fields of `Plan` and `Layout` to change: gpus, tp, pp, vpp, sp, cp, seq_length, micro_batch, global_batch.
Fine-tuning also takes `dataset_root` (a folder with training.jsonl and validation.jsonl) and `packed`, and PEFT
`peft_scheme` ("lora", "dora", or an object of the host's) before all others.
All raise UnsupportedConfig, UnsupportedLayout or CheckpointError for what cannot work.

ERNIE 4.5: pretraining balances experts by updating the selection bias, fine-tuning leaves it alone; adapters go on
attention only where there are experts.
EXAONE 4.5: `exaone45_vl_*` train on conversations with images (`common.conversations` says what their files hold), with
`megatron.bridge.training.vlm_step.forward_step` in the place of `gpt_step`'s; their names are the host's, and without
a folder the published processor is downloaded, which a miniature has none of. The language model learns, and the
merger after the tower; to train the tower too, `config.model.freeze_vision_model = False`. `exaone45_33b_*` train the
language model on questions and answers in words; tower and merger are frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import ConfigContainer

from exaone_bridge.recipes import build

__all__ = ["function_of"]

HFPath = str | Path | None
Recipe = Callable[..., ConfigContainer]

_TITLES = {
    "exaone4_1p2b": "EXAONE-4.0-1.2B",
    "exaone4_32b": "EXAONE-4.0-32B",
    "exaone4_tiny": "a miniature EXAONE 4.0 hybrid",
    "exaone45_33b": "the language model of EXAONE-4.5-33B, on words",
    "exaone45_vl_33b": "EXAONE-4.5-33B, on conversations with images",
    "exaone45_vl_tiny": "a miniature EXAONE 4.5, on conversations with images",
    "ernie45_0p3b": "ERNIE-4.5-0.3B",
    "ernie45_21b_a3b": "ERNIE-4.5-21B-A3B",
    "ernie45_300b_a47b": "ERNIE-4.5-300B-A47B",
    "ernie45_tiny": "a miniature ERNIE 4.5 mixture of experts",
}


def _pretrain(model: str, stage: str) -> Recipe:
    def recipe(gpu_memory_gb: int = 80, hf_path: HFPath = None, **changes: Any) -> ConfigContainer:
        return build.pretrain(model, stage, gpu_memory_gb, hf_path, **changes)

    long = (
        ", on sequences as long as it has positions, cut by context parallelism"
        if stage != "pretrain"
        else ""
    )
    recipe.__doc__ = f"Pretraining of {_TITLES[model]}{long}."
    return recipe


def _sft(model: str, several: bool) -> Recipe:
    def recipe(
        gpu_memory_gb: int = 80,
        hf_path: HFPath = None,
        dataset_root: HFPath = None,
        packed: bool = several,
        **changes: Any,
    ) -> ConfigContainer:
        return build.sft(model, gpu_memory_gb, hf_path, dataset_root, packed, **changes)

    recipe.__doc__ = f"Fine-tuning of every parameter of {_TITLES[model]}."
    return recipe


def _peft(model: str, several: bool) -> Recipe:
    def recipe(
        peft_scheme: str | PEFT = "lora",
        gpu_memory_gb: int = 80,
        hf_path: HFPath = None,
        dataset_root: HFPath = None,
        packed: bool = several,
        **changes: Any,
    ) -> ConfigContainer:
        return build.peft(
            model, peft_scheme, gpu_memory_gb, hf_path, dataset_root, packed, **changes
        )

    recipe.__doc__ = f"LoRA or DoRA on {_TITLES[model]}."
    return recipe


def function_of(name: str, model: str, stage: str) -> Recipe:
    """The recipe of this name: (model, stage) is a key of `PLANS`. A miniature's samples are not packed unasked, nor
    are conversations with images."""
    several = not ("_tiny" in model or "_vl_" in model)
    fine_tuning = {"sft": _sft, "peft": _peft}
    recipe = fine_tuning[stage](model, several) if stage in fine_tuning else _pretrain(model, stage)
    recipe.__name__ = recipe.__qualname__ = name
    recipe.__module__ = "exaone_bridge.recipes"  # where it is found
    return recipe
