"""Core attention for the torch backend: `scaled_dot_product_attention`, causal, windowed, grouped-query.

Megatron-Core's `DotProductAttention` builds its masks on "cuda", holds all scores of all heads at once, and its fused
softmax forgets the window.

Axes: S sequence, B batch, N query heads of this rank, G key-value heads of this rank, D head.
"""

from __future__ import annotations

import functools
import itertools

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from exaone_bridge.errors import UnsupportedConfig, UnsupportedLayout

__all__ = ["TorchDotProductAttention"]


@functools.lru_cache(maxsize=8)
def _window_mask(length: int, left: int, device: torch.device) -> torch.Tensor:
    """[S, S] bool, True where query i may see key j: i - left <= j <= i."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance <= left)


class TorchDotProductAttention(MegatronModule):
    """Causal self-attention of one layer, with the window that the config gives that layer.

    Raises:
        UnsupportedLayout: context parallelism, which only Transformer Engine has.
        UnsupportedConfig: a mask other than causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise UnsupportedLayout(
                "context parallelism",
                got=config.context_parallel_size,
                wanted="1 with backend 'torch'",
                remedy="use backend 'transformer_engine'",
            )
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise UnsupportedConfig(
                "attn_mask_type", got=f"{attention_type}, {attn_mask_type}", known=("self, causal",), where="layer spec"
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.left = config.window_size[0] if windowed else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, N, D]; or [T, N, D] with `packed_seq_params`, T the tokens of all documents.
            key, value: [S, B, G, D]; or [T, G, D].
            attention_mask: ignored: the mask is causal (and the layer's window), as the config says.
            packed_seq_params: where documents begin, for packed sequences.

        Returns:
            [S, B, N * D]; or [T, N * D].
        """
        if packed_seq_params is None:
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, heads, S, D]
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        starts = packed_seq_params.cu_seqlens_q_padded
        starts = (packed_seq_params.cu_seqlens_q if starts is None else starts).tolist()
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))  # [1, heads, T, D]
        documents = [
            self._attend(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
            for begin, end in itertools.pairwise(starts)
        ]
        return torch.cat(documents, dim=2)[0].transpose(0, 1).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[B, heads, S, D] -> [B, N, S, D]."""
        length = query.shape[2]
        mask = None
        if self.left is not None and length > self.left + 1:  # a shorter sequence never meets the window's edge
            mask = _window_mask(length, self.left, query.device)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
