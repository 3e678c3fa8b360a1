"""Use in a training script: a Hugging Face model becomes a Megatron-Core model, trains, and goes back.

    torchrun --nproc-per-node 8 examples/train.py HF_FOLDER OUTPUT_FOLDER --tp 2 --pp 2     # GPUs
    python examples/train.py HF_FOLDER OUTPUT_FOLDER --steps 2                               # a laptop

The loop is written out to show where the plugin ends: at the first four lines of `main` and its last. Megatron-Bridge's
own `pretrain` and `finetune` take the same provider.
"""

# ruff: noqa: I001  (without Transformer Engine, exaone_bridge has to be imported before megatron.bridge)

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import exaone_bridge  # registers EXAONE with Megatron-Bridge
import torch
from megatron.bridge import AutoBridge
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config


def forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return model(tokens, positions, None, labels=labels), lambda loss: (
        loss.mean(),
        {"loss": loss.mean().detach()},
    )


def main(options: argparse.Namespace) -> None:
    bridge = AutoBridge.from_hf_pretrained(options.hf_folder)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = (
        options.tp,
        options.pp,
    )
    provider.finalize()

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(provider.vocab_size, (4, options.length + 1), generator=generator).to(
        device()
    )
    model = train(
        provider,
        forward_step,
        tokens.split(1),
        options.length,
        options.steps,
        lr=1e-4,
        weight_decay=0.1,
    )
    bridge.save_hf_pretrained(model, options.output, show_progress=False)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def train(
    provider: Any,
    forward_step: Callable[..., Any],
    data: Sequence[Any],
    length: int,
    steps: int,
    **adam: float,
) -> list[Any]:
    """The provider's model after `steps` steps, each on all of `data`, one micro-batch of `length` words an item."""
    gpu = torch.cuda.is_available()
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=gpu)
    model = provider.provide_distributed_model(ddp_config=ddp, use_cpu_initialization=not gpu)
    config = get_model_config(model[0])
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", bf16=provider.bf16, use_distributed_optimizer=gpu, **adam
        ),
        model,
    )
    for step in range(steps):
        optimizer.zero_grad()
        for chunk in model:
            chunk.zero_grad_buffer()
        done = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(data),
            model=model[0],
            num_microbatches=len(data),
            seq_length=length,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        if done:
            print(
                f"step {step + 1}: loss {torch.stack([item['loss'] for item in done]).mean():.4f}",
                flush=True,
            )
    return model


def start(options: argparse.Namespace, main: Callable[[argparse.Namespace], None] = main) -> None:
    """Where there is no GPU: one rank on gloo, inside the runtime that lets Megatron-Core run without CUDA."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        runtime: Any = contextlib.nullcontext()
    else:
        runtime = exaone_bridge.cpu_runtime()
    with runtime:
        main(options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("hf_folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=64)
    start(parser.parse_args())
