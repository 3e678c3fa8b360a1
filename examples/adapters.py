"""Train a LoRA adapter in a loop written out, resume it, merge it, and exchange it with PEFT.

    python examples/adapters.py HF_PATH OUTPUT --steps 2                    # also on a CPU
    python examples/adapters.py HF_PATH OTHER --resume OUTPUT/checkpoints
    python examples/adapters.py HF_PATH OTHER --from-peft OUTPUT/adapter    # or any adapter of PEFT

OUTPUT gets `checkpoints`, as Megatron-Bridge's training loop saves them (lora.py), `merged`, a
Hugging Face model, and `adapter`, for `peft.PeftModel.from_pretrained`.
"""

# ruff: noqa: I001  (exaone_bridge before megatron.bridge, which needs it without Transformer Engine)

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import exaone_bridge
import torch
from megatron.bridge import AutoBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.utils import load_peft_adapter_checkpoint
from megatron.bridge.training.checkpointing import save_checkpoint
from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
from megatron.bridge.training.state import GlobalState
from megatron.core.optimizer import OptimizerConfig
from train import DEVICE, forward_step, run, train


def main(options: argparse.Namespace) -> None:
    provider = AutoBridge.from_hf_pretrained(options.hf_path).to_megatron_provider()
    provider.finalize()
    if options.from_peft is None:
        peft = LoRA(dim=8, alpha=16, target_modules=["linear_qkv", "linear_proj"])
    else:
        peft = exaone_bridge.lora_from_peft(options.from_peft)

    def add_adapters(model: list[Any]) -> list[Any]:
        model = peft(model, training=True)
        peft.set_params_to_save(model)
        if options.resume is not None:
            load_peft_adapter_checkpoint(model, options.resume / "iter_0000001", peft)
        return model

    provider.register_pre_wrap_hook(add_adapters)
    generator = torch.Generator().manual_seed(0)
    shape = (4, options.seq_length + 1)  # four microbatches of one sequence
    batches = torch.randint(provider.vocab_size, shape, generator=generator).to(DEVICE).split(1)
    model = train(provider, forward_step, batches, options.seq_length, options.steps, lr=1e-3)
    save(model, provider, peft, options.output / "checkpoints")
    for name, in_peft in (("merged", False), ("adapter", True)):
        exaone_bridge.export_checkpoint(
            options.hf_path,
            options.output / name,
            adapter=options.output / "checkpoints",
            peft=in_peft,
        )


def save(model: list[Any], provider: Any, peft: Any, folder: Path) -> None:
    """Save the adapters as iteration 1; Megatron-Bridge's own loop saves the optimizer too."""
    state = GlobalState()
    state.cfg = ConfigContainer(
        model=provider,
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
    state.train_state.step = 1
    save_checkpoint(state, model, None, None, 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_path", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--resume", type=Path, help="checkpoints of an earlier run")
    parser.add_argument("--from-peft", type=Path, help="an adapter of PEFT to go on from")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq-length", type=int, default=64)
    run(main, parser.parse_args())
