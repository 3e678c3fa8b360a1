"""Use exaone_bridge in a training loop: load a Hugging Face model, train it, and save it again.

    torchrun --nproc-per-node 8 examples/train.py HF_PATH OUTPUT --tp 2 --pp 2     # on GPUs
    python examples/train.py HF_PATH OUTPUT --steps 2                               # on a CPU

Only the first lines of `main` and its last one use exaone_bridge, through Megatron-Bridge. The loop
is written out; Megatron-Bridge's `pretrain` and `finetune` take the same provider (sft.py).
"""

# ruff: noqa: I001  (exaone_bridge before megatron.bridge, which needs it without Transformer Engine)

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import exaone_bridge  # registers the models with Megatron-Bridge
import torch
from megatron.bridge import AutoBridge
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(options: argparse.Namespace) -> None:
    bridge = AutoBridge.from_hf_pretrained(options.hf_path)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = options.tp
    provider.pipeline_model_parallel_size = options.pp
    provider.finalize()

    generator = torch.Generator().manual_seed(0)
    shape = (4, options.seq_length + 1)  # four microbatches of one sequence
    tokens = torch.randint(provider.vocab_size, shape, generator=generator).to(DEVICE)
    batches = tokens.split(1)
    model = train(provider, forward_step, batches, options.seq_length, options.steps, lr=1e-4)
    bridge.save_hf_pretrained(model, options.output, show_progress=False)


def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """Run one microbatch of tokens [1, S + 1]."""
    batch = next(batches)
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return losses.mean(), {"loss": losses.mean().detach()}

    return model(tokens, position_ids, None, labels=labels), loss_function


def train(
    provider: Any,
    forward_step: Callable[..., Any],
    batches: Sequence[Any],
    seq_length: int,
    steps: int,
    *,
    lr: float,
    weight_decay: float = 0.1,
) -> list[Any]:
    """Build the provider's model and train it, with all `batches` in each step.

    Returns:
        The model chunks of this rank.
    """
    use_gpu = DEVICE == "cuda"
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=use_gpu)
    model = provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=not use_gpu)
    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=weight_decay,
        bf16=provider.bf16,
        use_distributed_optimizer=use_gpu,
    )
    optimizer = get_megatron_optimizer(optimizer_config, model)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for chunk in model:
            chunk.zero_grad_buffer()
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model[0],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        # The last rank is on the last pipeline stage, which has the loss.
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            loss = torch.stack([output["loss"] for output in outputs]).mean()
            print(f"step {step}: loss {loss:.4f}", flush=True)
    return model


def run(main: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> None:
    """Run `main` on this rank's GPU; without a GPU, on the CPU as a single rank."""
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with contextlib.nullcontext() if DEVICE == "cuda" else exaone_bridge.cpu_runtime():
        main(options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_path", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq-length", type=int, default=64)
    run(main, parser.parse_args())
