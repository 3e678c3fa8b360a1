"""Row-parallel linears with the norm on their output, one for each backend.

EXAONE 4.0 normalises what a sublayer puts out, before the residual is added (QK-Reorder-Norm). With the norm inside
the linear, Megatron-Core's TransformerLayer needs no change: parameter `linear_proj.post_layernorm.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TERowParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.modules.norm import FusedRMSNorm, TorchRMSNorm

__all__ = ["PostNorm", "RowParallelLinearLayerNorm", "TERowParallelLinearLayerNorm"]


class PostNorm:
    """Mixin over a row-parallel linear: [S, B, I / tp] -> linear, summed over tp -> norm -> [S, B, O]."""

    norm: type
    norm_is_deferred = (
        False  # True: a wrapper that adds an adapter to the output applies the norm after it
    )

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        # The model's own epsilon: Megatron-Core's norms default to 1e-5.
        self.post_layernorm = self.norm(
            config=config, hidden_size=output_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        output, bias = super().forward(hidden)  # type: ignore[misc]
        if bias is not None:
            raise ValueError(
                f"{type(self).__name__}: a bias was left to add after the norm; set add_bias_linear=False."
            )
        return (output if self.norm_is_deferred else self.post_layernorm(output)), None


class RowParallelLinearLayerNorm(PostNorm, RowParallelLinear):
    """Megatron-Core's local row-parallel linear, then RMSNorm."""

    norm = TorchRMSNorm


if HAVE_TE:

    class TERowParallelLinearLayerNorm(PostNorm, TERowParallelLinear):
        """Transformer Engine's row-parallel linear, then RMSNorm."""

        norm = FusedRMSNorm

else:
    TERowParallelLinearLayerNorm = None  # type: ignore[assignment, misc]
