"""Transformer layers with causal attention: what they do otherwise than Megatron-Core 0.19.2's.

- Their CUDA graphs have no attention mask. Megatron-Core gives each graph a mask of B x S / cp x S
  bytes as an input, and makes and copies another at every replay
  (`transformer/transformer_layer.py`, `get_layer_static_inputs` and
  `_get_te_cuda_graph_replay_args`): 64 MiB a layer at 8192 tokens, 4 GiB at 65536. Attention of our
  models ignores the mask.
- Their linears can add weight gradients to the fp32 main gradients within the matrix product, where
  the output layer cannot. Megatron-Core has one switch for both, and its output layer needs APEX.

Axes: S sequence, B batch, H hidden, cp context-parallel size, tp tensor-parallel size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

__all__ = ["CausalLayer", "CausalTransformerLayer"]


class CausalLayer:
    """Mixin for a TransformerLayer that ignores `attention_mask`.

    It is a mixin because Transformer Engine replaces `__call__` of each layer's class during the
    capture (`pytorch/graph.py`, `wrap_autocast`), and would leave it replaced in a class that is
    derived from another one in the same model.
    """

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        if getattr(config, "fuse_weight_gradients", False):
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]

    def get_layer_static_inputs(
        self, seq_length: int, micro_batch_size: int
    ) -> dict[str, torch.Tensor]:
        """Return a graph's inputs: `hidden_states` [S / cp, B, H], with SP [S / cp / tp, B, H].

        Args:
            seq_length: S.
            micro_batch_size: B.
        """
        inputs: dict[str, torch.Tensor] = GraphableMegatronModule.get_layer_static_inputs(
            self, seq_length, micro_batch_size
        )
        return inputs

    def _get_te_cuda_graph_replay_args(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("attention_mask", None)
        return super()._get_te_cuda_graph_replay_args(*args, **kwargs)  # type: ignore[misc]


class CausalTransformerLayer(CausalLayer, TransformerLayer):
    """A TransformerLayer with causal attention."""
