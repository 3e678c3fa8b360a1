"""Tiny models as wide as Transformer Engine's kernels need, and both sides' logits and training.

Everything runs on a CPU as well, on the torch backend, so that these helpers can be tried anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.verification.workflow.workload import random_prompts
from tests.helpers.bf16 import Outputs, Prompts, hf_outputs, outputs_of
from tests.helpers.exaone45 import changed
from tests.helpers.training import Batches, device, to_device

LANGUAGE_MODELS = ["exaone4", "exaone4-1.2b", "ernie45", "ernie45-300b", "ernie45-dense"]
MOE_MODELS = ["ernie45", "ernie45-300b"]
BACKENDS = ["transformer_engine", "torch"]


def wide(name: str, dtype: str = "float32") -> dict[str, Any]:
    """Return config fields that Transformer Engine's kernels support, for the `tiny` fixture.

    Heads have 64 dimensions, widths are multiples of 16, and the sliding window has 64 tokens.
    """
    fields: dict[str, Any] = {
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "dtype": dtype,
    }
    if name in ("exaone4", "exaone45"):
        fields["sliding_window"] = 64
    if name in (*MOE_MODELS, "exaone-moe", "exaone-moe-2"):
        fields["moe_intermediate_size"] = 128
    if name != "exaone45":
        return fields
    vision = {"hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 256, "dtype": dtype}
    nested = {f"text_config__{field}": value for field, value in fields.items()}
    nested |= {f"vision_config__{field}": value for field, value in vision.items()}
    return changed(dtype=dtype, **nested)


def long_prompts(folder: Path, count: int = 4, length: int = 300) -> Prompts:
    """Return random text, and for a vision model also prompts with images and videos."""
    from exaone_bridge.models.exaone45.config import ARCHITECTURE, read_hf_config
    from exaone_bridge.models.exaone45.prompts import image_prompts

    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != [ARCHITECTURE]:
        return [(random_prompts(config["vocab_size"], count, length), [])]
    model_config = read_hf_config(config)
    text = random_prompts(model_config.vocab_size, count, length)
    return [(text, []), image_prompts(model_config, 8, seed=3)]


def hf_logits(folder: Path, runs: Prompts, dtype: torch.dtype) -> torch.Tensor:
    """Return Transformers' fp32 logits [positions of all prompts, V] on the CPU."""
    return hf_outputs(folder, runs, dtype).logits


def megatron_outputs(
    folder: Path,
    runs: Prompts,
    dtype: torch.dtype,
    backend: str = "transformer_engine",
    **overrides: Any,
) -> Outputs:
    """Run Megatron-Core on one rank."""
    from megatron.bridge import AutoBridge

    from exaone_bridge.runtime.model import build

    bridge = AutoBridge.from_hf_pretrained(folder)
    model = build(bridge, Layout(), dtype=dtype, backend=backend, **overrides)
    outputs = outputs_of(folder, model, runs)
    assert outputs is not None
    return outputs


def megatron_logits(folder: Path, *args: Any, **options: Any) -> torch.Tensor:
    """Return the fp32 logits [positions of all prompts, V] of Megatron-Core on one rank.

    Args:
        folder, args, options: of `megatron_outputs`.
    """
    return megatron_outputs(folder, *args, **options).logits


def logits_of(model: list[Any], runs: Prompts) -> torch.Tensor | None:
    """Return the fp32 logits of a Megatron-Core model, or None before the last pipeline stage."""
    from exaone_bridge.runtime.model import forward_logits

    found = [forward_logits(model, tokens, images) for tokens, images in runs]
    logits = [each.flatten(0, 1) for each in found if each is not None]
    return torch.cat(logits) if logits else None


def train_mixed_precision(
    folder: Path,
    steps: Iterable[Batches],
    *,
    precision: str = "bf16_mixed",
    before_update: Callable[[int, Any], None] = lambda step, model: None,
    optimizer: dict[str, Any],
    **overrides: Any,
) -> tuple[list[float], Any]:
    """Train with fp32 main weights and gradients, and the distributed optimizer, on one rank.

    Args:
        folder: the Hugging Face folder of the model.
        steps: the microbatches of each step.
        precision: the name of a mixed precision recipe of Megatron-Bridge.
        before_update: is called with the step and the model when the step's gradients are there.
        optimizer: fields of Megatron-Core's `OptimizerConfig`.
        overrides: fields of the provider.

    Returns:
        The loss of each step, and the model.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    settings = OptimizerConfig(weight_decay=0.0, use_distributed_optimizer=True, **optimizer)
    wrapper = DistributedDataParallelConfig(use_distributed_optimizer=True)
    get_mixed_precision_config(precision).setup(provider, settings, wrapper)
    for name, value in overrides.items():
        setattr(provider, name, value)
    provider.finalize()
    (model,) = provider.provide_distributed_model(
        ddp_config=wrapper, use_cpu_initialization=device() == "cpu"
    )
    config = get_model_config(model)
    config.finalize_model_grads_func = finalize_model_grads
    megatron_optimizer = get_megatron_optimizer(settings, [model])
    config.grad_scale_func = megatron_optimizer.scale_loss

    def forward_step(iterator: Any, chunk: Any) -> Any:
        tokens, images = next(iterator)
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        output = chunk(inputs, positions, None, labels=labels, **images)
        return output, lambda loss: (loss.float().mean(), {"loss": loss.detach().float().mean()})

    losses = []
    for step, batches in enumerate(steps):
        model.train()
        model.zero_grad_buffer()
        megatron_optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(to_device(batches)),
            model=model,
            num_microbatches=len(batches),
            seq_length=batches[0][0].shape[1] - 1,
            micro_batch_size=1,
            forward_only=False,
        )
        before_update(step, model)
        updated, _, _ = megatron_optimizer.step()
        assert updated
        losses.append(torch.stack([output["loss"] for output in outputs]).mean().item())
    return losses, model
