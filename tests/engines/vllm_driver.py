"""Loads exports with vLLM's loaders and runs its models, in vLLM's environment. Not a test.

    python tests/engines/vllm_driver.py FOLDER ...

Each FOLDER has `exported` and `tokens.npy`, and gets `logits.npy` or `error.txt`. Where there is a
`drafter.txt`, the model of multi-token prediction is loaded too, and its class written there.

What vLLM computes with kernels is computed in plain torch here: attention, and the experts of MoE
layers with ERNIE's choice of them. All else is vLLM's own Python: configs, loaders, models, RoPE,
norms, activations.
"""

# ruff: noqa: E402 (vLLM is told the platform before its modules look for it)

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
import numpy as np
import torch
import vllm.platforms
from torch.nn.functional import scaled_dot_product_attention, silu
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()  # the wheel is made for CUDA

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router, router_factory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.models import registry

CONTEXT = 512  # tokens


def attention(
    self: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Causal attention of one prompt, in the layer's window: [S, heads * D] -> the same."""
    length = len(query)
    q, k, v = (x.view(length, -1, self.head_size).transpose(0, 1) for x in (query, key, value))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < (self.sliding_window or length))
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=self.impl.scale, enable_gqa=True
    )
    return out.transpose(0, 1).reshape(length, -1)


def experts(
    self: UnquantizedFusedMoEMethod,
    layer: Any,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    shared_experts: object,
    shared_experts_input: object,
) -> torch.Tensor:
    """The weighted sum of the chosen experts: [S, H] -> [S, H]. vLLM adds the shared ones."""
    gate, up = torch.einsum("sh,eih->sei", x, layer.w13_weight).chunk(2, -1)
    if (limit := getattr(layer, "swiglu_limit", None)) is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    out = torch.einsum("sei,ehi->seh", silu(gate) * up, layer.w2_weight)
    weights = torch.zeros(out.shape[:2]).scatter(1, topk_ids.long(), topk_weights)
    return torch.einsum("se,seh->sh", weights, out)


def softmax_topk(
    weights: torch.Tensor,
    ids: torch.Tensor,
    _: torch.Tensor,
    router_logits: torch.Tensor,
    renormalize: bool,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose by biased scores [S, E], weigh by unbiased ones: weights and ids [S, K]."""
    scores = router_logits.float().softmax(-1)
    chosen = (scores if bias is None else scores + bias).topk(ids.shape[1]).indices
    found = scores.gather(1, chosen)
    return (found / found.sum(-1, keepdim=True) if renormalize else found), chosen.to(ids.dtype)


class GPURouters:
    """The platform, for the choice of the router: on a GPU, not the router of CPUs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(vllm.platforms._current_platform, name)

    def is_cpu(self) -> bool:
        return False


def put_torch_in_place_of_kernels() -> None:
    registry._run_in_subprocess = lambda inspect: inspect()  # which would look for a GPU again
    Attention.forward = attention
    method: Any = UnquantizedFusedMoEMethod
    method.apply = experts
    method.process_weights_after_loading = lambda self, layer: None
    method.mk_can_overlap_shared_experts = property(lambda self: False)
    router_factory.current_platform = GPURouters()
    fused_topk_bias_router.vllm_topk_softmax = softmax_topk


def load(folder: Path, drafter: bool = False) -> tuple[Any, VllmConfig]:
    """Load an export as `vllm serve` does; a parameter that gets no tensor is an error.

    Args:
        folder: the export.
        drafter: load the model that proposes tokens by multi-token prediction instead.
    """
    speculative = {"method": "mtp", "num_speculative_tokens": 1} if drafter else None
    config = EngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=CONTEXT,
        enforce_eager=True,
        skip_tokenizer_init=True,
        compilation_config={"custom_ops": ["none"], "mode": 0},
        speculative_config=speculative,
    ).create_engine_config()
    rotary_embedding._ROPE_DICT.clear()  # ERNIE changes the one that it shares with other models
    with set_current_vllm_config(config):
        destroy_model_parallel()
        initialize_model_parallel(1, 1)
        loader = get_model_loader(config.load_config)
        of = config.speculative_config.draft_model_config if drafter else config.model_config
        return loader.load_model(vllm_config=config, model_config=of), config


@torch.no_grad()
def logits(folder: Path) -> np.ndarray:
    """Return the logits [S, V] of the tokens [S]."""
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    model, config = load(folder / "exported")
    text: Callable[..., torch.Tensor] = getattr(model, "language_model", model).model
    with (
        set_current_vllm_config(config),
        set_forward_context(None, config, num_tokens=len(tokens)),
    ):
        hidden = text(tokens, torch.arange(len(tokens)), None)
        return model.compute_logits(hidden).numpy()


def main() -> None:
    """Load and run every folder; one that fails does not stop the others."""
    put_torch_in_place_of_kernels()
    with tempfile.TemporaryDirectory() as work:
        init_distributed_environment(1, 0, f"file://{work}/store", 0, "gloo")
        for folder in map(Path, sys.argv[1:]):
            try:
                np.save(folder / "logits.npy", logits(folder))
                if (folder / "drafter.txt").exists():
                    model, _ = load(folder / "exported", drafter=True)
                    (folder / "drafter.txt").write_text(type(model).__name__)
            except Exception:
                (folder / "error.txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main()
