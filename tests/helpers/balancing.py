"""One training step of a tiny model, to see what load balancing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def after_one_step(
    folder: Path, tokens: torch.Tensor, overrides: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Take one step with `finalize_model_grads`.

    Args:
        folder: a tiny model whose second layer is a MoE layer.
        tokens: [1, S + 1].
        overrides: provider fields.

    Returns:
        `bias`, the selection bias [E] of this layer's router, and `gradient` [E, H] of its weight.
    """
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads

    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider()
    provider.apply_overrides_and_finalize(torch.float32, overrides)
    (model,) = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        use_cpu_initialization=True,
    )
    model.train()
    positions = torch.arange(tokens.shape[1] - 1)[None]
    model(
        tokens[:1, :-1].contiguous(), positions, None, labels=tokens[:1, 1:].contiguous()
    ).mean().backward()
    finalize_model_grads([model])
    router = model.module.decoder.layers[1].mlp.router
    return {"bias": router.expert_bias.clone(), "gradient": router.weight.main_grad.clone()}
