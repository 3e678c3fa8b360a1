"""Column-parallel linear with the norm on its input, for the torch backend.

The twin of Transformer Engine's `TELayerNormColumnParallelLinear`: the same constructor and the same parameter,
`layer_norm_weight`, so that a Megatron checkpoint moves between the backends.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.modules.norm import TorchRMSNorm

__all__ = ["TorchLayerNormColumnParallelLinear"]


class TorchLayerNormColumnParallelLinear(ColumnParallelLinear):
    """[S, B, I] -> RMSNorm -> linear, cut along its outputs: [S, B, O / tp]."""

    return_layernorm_output = (
        False  # True: the output is a pair, with the norm's; adapters take it (Transformer Engine)
    )

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = TorchRMSNorm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight  # marked for sequence parallelism
        self.eps = config.layernorm_epsilon

    def forward(
        self, hidden: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, torch.Tensor | None]:
        """Normalise, then multiply; the bias is returned where it is to be added later."""
        normed = torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], self.layer_norm_weight, self.eps
        )
        output, bias = super().forward(normed, *args, **kwargs)
        return ((output, normed) if self.return_layernorm_output else output), bias
