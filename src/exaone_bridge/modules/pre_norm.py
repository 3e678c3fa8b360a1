"""Column-parallel linear with RMSNorm on its input, for the torch backend.

It has the constructor and the parameter `layer_norm_weight` of Transformer Engine's
`TELayerNormColumnParallelLinear`, so that a Megatron checkpoint loads with either backend.

Axes: S sequence, B batch, I input features, O output features, tp tensor-parallel size.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.modules.norm import TorchRMSNorm

__all__ = ["TorchLayerNormColumnParallelLinear"]


class TorchLayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then Megatron-Core's column-parallel linear.

    Attributes:
        return_layernorm_output: True: `forward` returns (output, norm's output), as Transformer
            Engine's does, for adapters.
    """

    return_layernorm_output = False

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = TorchRMSNorm(config, input_size, config.layernorm_epsilon)
        self.layer_norm_weight = norm.weight  # marked for sequence parallelism
        self.eps = config.layernorm_epsilon

    def forward(
        self, hidden: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        """Normalise and project.

        Args:
            hidden: [S, B, I] ([S / tp, B, I] with sequence parallelism).
            args, kwargs: of `ColumnParallelLinear.forward`.

        Returns:
            [S, B, O / tp] (with `return_layernorm_output` a pair with the normalised input, in
            the shape of `hidden`), and the bias [O / tp] if it is not added yet.
        """
        normed = torch.nn.functional.rms_norm(
            hidden, hidden.shape[-1:], self.layer_norm_weight, self.eps
        )
        output, bias = super().forward(normed, *args, **kwargs)
        return ((output, normed) if self.return_layernorm_output else output), bias
