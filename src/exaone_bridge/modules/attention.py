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
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.context_parallel import positions_of

__all__ = ["TorchDotProductAttention"]


@functools.lru_cache(maxsize=8)
def _window_mask(length: int, left: int, device: torch.device) -> torch.Tensor:
    """[S, S] bool, True where query i may see key j: i - left <= j <= i."""
    distance = (
        torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    )
    return (distance >= 0) & (distance <= left)


def _starts(packed: PackedSeqParams) -> list[int]:
    """Where documents begin, and where the last one ends."""
    padded = packed.cu_seqlens_q_padded
    return (packed.cu_seqlens_q if padded is None else padded).tolist()


class TorchDotProductAttention(MegatronModule):
    """Causal self-attention of one layer, with the window that the config gives that layer.

    With context parallelism each rank gathers the keys and values of the others, whatever `cp_comm_type` says.

    Raises:
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
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise UnsupportedConfig(
                "attn_mask_type",
                got=f"{attention_type}, {attn_mask_type}",
                known=("self, causal",),
                where="layer spec",
            )
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.left = config.window_size[0] if windowed else None
        self.cp_group = (
            pg_collection.cp
            if pg_collection is not None and config.context_parallel_size > 1
            else None
        )

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
        if self.cp_group is not None:
            return self._attend_over_ranks(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            q, k, v = (
                tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)
            )  # [B, heads, S, D]
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        q, k, v = (
            tensor.transpose(0, 1)[None] for tensor in (query, key, value)
        )  # [1, heads, T, D]
        documents = [
            self._attend(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
            for begin, end in itertools.pairwise(_starts(packed_seq_params))
        ]
        return torch.cat(documents, dim=2)[0].transpose(0, 1).flatten(1)

    def _attend_over_ranks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams | None,
    ) -> torch.Tensor:
        """As `forward`; S (or T) are this rank's positions, in the order of `modules/context_parallel.py`."""
        assert self.cp_group is not None
        key, value = (
            gather_from_sequence_parallel_region(tensor, group=self.cp_group)
            for tensor in (key, value)
        )
        starts = [0, len(key)] if packed is None else _starts(packed)
        held = [
            torch.cat(
                [
                    begin + positions_of(rank, self.cp_group.size(), end - begin, query.device)
                    for begin, end in itertools.pairwise(starts)
                ]
            )
            for rank in range(self.cp_group.size())
        ]
        mine, every = held[self.cp_group.rank()], torch.cat(held)
        ends = torch.tensor(starts[1:], device=query.device)
        first = torch.tensor(starts, device=query.device)[
            torch.bucketize(mine, ends, right=True)
        ]  # of the document
        mask = (every[None] <= mine[:, None]) & (every[None] >= first[:, None])
        if self.left is not None:
            mask &= mine[:, None] - every[None] <= self.left
        if packed is None:
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self._attend(q, k, v, mask).permute(2, 0, 1, 3).flatten(2)
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return self._attend(q, k, v, mask)[0].transpose(0, 1).flatten(1)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, heads, S, D] -> [B, N, S, D]; without a mask [S, S keys], causal with the layer's window."""
        length = query.shape[2]
        # A sequence no longer than the window never meets its edge.
        if mask is None and self.left is not None and length > self.left + 1:
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
