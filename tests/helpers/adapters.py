"""Adapters of Megatron-Bridge and of PEFT, their checkpoints and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ATTENTION = ["linear_qkv", "linear_proj"]


@torch.no_grad()
def hf_logits(folder: Path, tokens: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """Return the fp32 logits [N, S, V] of tokens [N, S], with the adapter if one is given."""
    model = hf_model(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    logits: torch.Tensor = model.eval()(tokens, use_cache=False).logits
    return logits


def hf_model(folder: Path) -> Any:
    """Load a model in fp32."""
    from transformers import AutoConfig

    from exaone_bridge.models.auto_class import auto_class

    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def make_peft(scheme: str, targets: list[str] | None = None, **fields: Any) -> Any:
    """Make a PEFT object of Megatron-Bridge; None: the scheme's own targets."""
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    if targets is not None:
        fields["target_modules"] = targets
    schemes = {"LoRA": LoRA, "DoRA": DoRA, "CanonicalLoRA": CanonicalLoRA}
    return schemes[scheme](**{"dim": 4, "alpha": 8, **fields})


@torch.no_grad()
def randomize(model: list[Any], std: float = 0.1) -> None:
    """Move all adapters away from where they start, in the same way on every rank."""
    torch.manual_seed(7)
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if ".adapter." in name and name.endswith(".linear_out.weight"):
                parameter.normal_(std=std)
            elif name.endswith(".adapter.weight_magnitude"):
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))


def save_adapter(model: list[Any], peft: Any, folder: Path, iteration: int = 3) -> None:
    """Save the adapters as Megatron-Bridge's training loop does."""
    from megatron.bridge.training.checkpointing import save_checkpoint
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
    from megatron.bridge.training.state import GlobalState
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.utils import get_model_config

    state = GlobalState()
    state.cfg = ConfigContainer(
        model=get_model_config(model[0]),
        train=None,
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
        ddp=None,
        scheduler=None,
        dataset=None,
        logger=LoggerConfig(),
        tokenizer=None,
        checkpoint=CheckpointConfig(save=str(folder), save_optim=False, save_rng=False),
        dist=None,
        peft=peft,
    )
    state.train_state.step = iteration
    peft.set_params_to_save(model)
    save_checkpoint(state, model, None, None, 0)
