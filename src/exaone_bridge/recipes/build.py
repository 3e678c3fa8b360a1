"""A plan and a configuration -> the host's ConfigContainer.

The model comes from a Hugging Face configuration through AutoBridge and our provider; no field of it is listed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.peft.base import PEFT
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config import ConfigContainer

from exaone_bridge.bridge.registration import supported
from exaone_bridge.errors import CheckpointError, UnsupportedConfig, UnsupportedLayout
from exaone_bridge.models import family_of
from exaone_bridge.recipes.common import container, conversations, questions_and_answers, text
from exaone_bridge.recipes.memory import GB, estimate
from exaone_bridge.recipes.plan import Plan
from exaone_bridge.recipes.plans import ADAPTER_RANK, plan_of
from exaone_bridge.recipes.published import CONFIGS

__all__ = ["peft", "pretrain", "sft"]

_PROCESSORS = {
    "exaone45_vl_33b": "LGAI-EXAONE/EXAONE-4.5-33B"
}  # where no folder is named; the run downloads it
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BIAS_UPDATE_RATE = 1e-3  # of the bias that selects experts; DeepSeek-V3 (2024), section 4.2
_ADAPTED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
_SCHEMES = {"lora": LoRA, "dora": DoRA}


def _provider(model: str, hf_path: str | Path | None) -> Any:
    """Of the folder where there is one, else of the published configuration."""
    supported()
    if hf_path is not None:
        if not (Path(hf_path) / "config.json").is_file():
            raise CheckpointError(
                hf_path,
                "config.json is missing",
                remedy="name a Hugging Face folder on disk; recipes download nothing",
            )
        return AutoBridge.from_hf_pretrained(str(hf_path)).to_megatron_provider(load_weights=False)
    from transformers import CONFIG_MAPPING

    config = CONFIGS[model]
    hf_config = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return AutoBridge.from_hf_config(hf_config).to_megatron_provider(load_weights=False)


def _planned(
    model: str, stage: str, gpu_memory_gb: int, provider: Any, changes: dict[str, Any]
) -> Plan:
    """The recipe's plan with the caller's changes, checked against the model and the GPU."""
    plan = plan_of(model, stage, gpu_memory_gb).changed(**changes)
    family = family_of(provider.hf_config["architectures"], where=f"recipe {model}")
    model_config = family.read_hf_config(provider.hf_config)
    plan.check(model_config)
    rank = ADAPTER_RANK if stage.endswith("peft") else 0
    needed = (
        estimate(family.mappings(model_config), model_config, plan, adapter_rank=rank).total / GB
    )
    if needed > gpu_memory_gb:
        raise UnsupportedLayout(
            "memory of a GPU",
            got=f"{gpu_memory_gb} GB",
            wanted=f"the {needed:.0f} GB that this plan is estimated to need",
            remedy="cut the model into more pieces, shorten the sequence, or recompute",
        )
    return plan


def _spread(provider: Any, plan: Plan) -> None:
    """Layout, lengths and kernels, on the provider."""
    for name, value in plan.layout.provider_overrides().items():
        setattr(provider, name, value)
    provider.seq_length = plan.seq_length
    provider.pipeline_dtype = torch.bfloat16
    if plan.recompute:
        provider.recompute_granularity, provider.recompute_method, provider.recompute_num_layers = (
            "full",
            "uniform",
            1,
        )


def _start_from(config: ConfigContainer, hf_path: str | Path | None) -> None:
    """Tokenizer and weights of the folder, where there is one; the model's vocabulary stays the published one."""
    tokenizer = config.tokenizer
    if hf_path is not None and any((Path(hf_path) / name).is_file() for name in _TOKENIZER_FILES):
        tokenizer.tokenizer_type, tokenizer.tokenizer_model = "HuggingFaceTokenizer", str(hf_path)
    else:
        tokenizer.tokenizer_type, tokenizer.vocab_size = "NullTokenizer", config.model.vocab_size
    if hf_path is not None:
        config.checkpoint.pretrained_checkpoint = str(
            hf_path
        )  # the host reads such a folder through our bridge


def pretrain(
    model: str, stage: str, gpu_memory_gb: int, hf_path: str | Path | None, **changes: Any
) -> ConfigContainer:
    """Training from random weights, or on from those in `hf_path`; the host's mock data until `dataset` is set.

    Raises:
        UnsupportedConfig, UnsupportedLayout, CheckpointError: see `Plan.check`, `plan_of`; or there is no such folder.
    """
    provider = _provider(model, hf_path)
    plan = _planned(model, stage, gpu_memory_gb, provider, changes)
    _spread(provider, plan)
    if provider.num_moe_experts:
        # ERNIE 4.5 balances its experts by the selection bias; an auxiliary loss beside it would be refused.
        provider.moe_router_enable_expert_bias = True
        provider.moe_router_bias_update_rate = _BIAS_UPDATE_RATE
    config = container(provider, plan, text(plan), iterations=300_000, rate=3e-4, warmup=500)
    _start_from(config, hf_path)
    return config


def _fine_tune(
    model: str,
    provider: Any,
    plan: Plan,
    hf_path: str | Path | None,
    root: str | Path | None,
    packed: bool,
    rate: float,
) -> ConfigContainer:
    _spread(provider, plan)
    images = "_vl_" in model
    dataset: Any
    if images:
        if packed and plan.cp > 1:
            raise UnsupportedLayout(
                "cp",
                got=plan.cp,
                wanted="1 where conversations with images are packed",
                remedy="leave packed out: the model cuts whole rows only",
            )
        dataset = conversations(plan, root, hf_path or _PROCESSORS.get(model), packed)
    else:
        dataset = questions_and_answers(plan, root, packed)
    if hasattr(provider, "freeze_vision_model"):
        # Questions and answers are words, which cannot train a tower. Of images its merger learns, and it stays.
        provider.freeze_vision_model, provider.freeze_vision_projection = True, not images
    config = container(provider, plan, dataset, iterations=1000, rate=rate, warmup=50)
    _start_from(config, hf_path)
    # Answers differ in length: the loss is that of a mean token, whatever copy of the model or part of a sequence
    # it is in, and not a mean of means.
    provider.calculate_per_token_loss, config.ddp.average_in_collective = True, False
    return config


def sft(
    model: str,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
    **changes: Any,
) -> ConfigContainer:
    """Training of every parameter on questions and answers; raises what `pretrain` does."""
    provider = _provider(model, hf_path)
    plan = _planned(model, "sft", gpu_memory_gb, provider, changes)
    return _fine_tune(model, provider, plan, hf_path, dataset_root, packed, rate=5e-6)


def peft(
    model: str,
    scheme: str | PEFT,
    gpu_memory_gb: int,
    hf_path: str | Path | None,
    dataset_root: str | Path | None,
    packed: bool,
    **changes: Any,
) -> ConfigContainer:
    """Training of LoRA or DoRA adapters; routed experts have none. Raises what `pretrain` does, and for a scheme."""
    if not isinstance(scheme, PEFT) and scheme not in _SCHEMES:
        known = tuple(_SCHEMES)
        raise UnsupportedConfig(
            "peft_scheme", got=scheme, known=known, where=f"recipe {model}_peft_config"
        )
    provider = _provider(model, hf_path)
    plan = _planned(model, "peft", gpu_memory_gb, provider, changes)
    config = _fine_tune(model, provider, plan, hf_path, dataset_root, packed, rate=1e-4)
    if isinstance(scheme, PEFT):
        config.peft = scheme
    else:
        targets = _ADAPTED[:2] if provider.num_moe_experts else _ADAPTED
        config.peft = _SCHEMES[scheme](dim=ADAPTER_RANK, alpha=ADAPTER_RANK, target_modules=targets)
    return config
