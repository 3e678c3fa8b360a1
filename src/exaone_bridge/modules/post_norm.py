"""Row-parallel linears with RMSNorm on their output, one for each backend.

EXAONE 4.0 normalises the output of a sublayer before the residual is added (QK-Reorder-Norm,
`Exaone4DecoderLayer` in Transformers 5.12.1). With the norm inside the linear, Megatron-Core's
TransformerLayer is used unchanged; the parameter is `linear_proj.post_layernorm.weight`.

Axes: S sequence, B batch, I input features, O output features, tp tensor-parallel size.
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE, TERowParallelLinear
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.modules.norm import FusedRMSNorm, TorchRMSNorm

__all__ = ["PostNorm", "RowParallelLinearLayerNorm", "TERowParallelLinearLayerNorm"]


class PostNorm:
    """Mixin for a row-parallel linear: linear, all-reduce over TP, then RMSNorm.

    Attributes:
        norm: the class of `post_layernorm`.
        norm_is_deferred: True: a wrapper that adds an adapter to the output applies the norm
            afterwards (`patches/lora.py`).
    """

    norm: type[torch.nn.RMSNorm]
    norm_is_deferred = False

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: object
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        # The config's epsilon: the default of Megatron-Core's norms is 1e-5.
        self.post_layernorm = self.norm(
            config=config, hidden_size=output_size, eps=config.layernorm_epsilon
        )

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Project and normalise.

        Args:
            hidden: [S, B, I / tp].

        Returns:
            [S, B, O] ([S / tp, B, O] with sequence parallelism), and no bias.

        Raises:
            ValueError: the linear has a bias, which would have to be added before the norm.
        """
        output, bias = super().forward(hidden)  # type: ignore[misc]
        if bias is not None:
            raise ValueError(
                f"{type(self).__name__}: the linear returns a bias to be added after the norm; "
                "set add_bias_linear=False."
            )
        return (output if self.norm_is_deferred else self.post_layernorm(output)), None


class RowParallelLinearLayerNorm(PostNorm, RowParallelLinear):
    """Megatron-Core's row-parallel linear, then RMSNorm."""

    norm = TorchRMSNorm


if HAVE_TE:

    class TERowParallelLinearLayerNorm(PostNorm, TERowParallelLinear):
        """Transformer Engine's row-parallel linear, then RMSNorm."""

        norm = FusedRMSNorm

else:
    TERowParallelLinearLayerNorm = None  # type: ignore[assignment, misc]
