"""Core attention of the torch backend: `scaled_dot_product_attention` with causal masks.

Megatron-Core 0.19.2's `DotProductAttention` (`transformer/dot_product_attention.py`) builds its
masks on "cuda", materialises the scores of all heads at once, and its fused causal softmax
(`fusions/fused_softmax.py`) ignores the sliding window.

Axes: S sequence, T tokens of all packed sequences, B batch, N query heads of this rank, G KV heads
of this rank, D head.
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
from exaone_bridge.modules.context_parallel import local_positions

__all__ = ["TorchDotProductAttention"]


@functools.lru_cache(maxsize=8)
def _sliding_window_mask(length: int, left: int, device: torch.device) -> torch.Tensor:
    """Return [S, S] bool, True where query i attends to key j: i - left <= j <= i."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    return (distance >= 0) & (distance <= left)


def _sequence_bounds(packed: PackedSeqParams) -> list[int]:
    """Return the offset of each packed sequence, and the end of the last one."""
    padded = packed.cu_seqlens_q_padded
    return (packed.cu_seqlens_q if padded is None else padded).tolist()


class TorchDotProductAttention(MegatronModule):
    """Causal self-attention of one layer, full or with the config's sliding window for that layer.

    With context parallelism each rank gathers the keys and values of the others, whatever
    `cp_comm_type` is.

    Raises:
        UnsupportedConfig: the mask is not causal, or it is cross attention.
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
        is_sliding = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.left = config.window_size[0] if is_sliding else None
        self.cp_group = None
        if pg_collection is not None and config.context_parallel_size > 1:
            self.cp_group = pg_collection.cp

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
        """Compute attention.

        Args:
            query: [S, B, N, D], or [T, N, D] with `packed_seq_params`.
            key, value: [S, B, G, D], or [T, G, D].
            attention_mask: ignored; the mask is causal, with the layer's window.
            attn_mask_type, attention_bias: ignored, as the config leaves them unset.
            packed_seq_params: the offsets of packed sequences.

        Returns:
            [S, B, N * D], or [T, N * D].
        """
        if self.cp_group is not None:
            return self._forward_context_parallel(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            # [S, B, heads, D] -> [B, heads, S, D]
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self._attend(q, k, v).permute(2, 0, 1, 3).flatten(2)
        # [T, heads, D] -> [1, heads, T, D]
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        sequences = [
            self._attend(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end])
            for begin, end in itertools.pairwise(_sequence_bounds(packed_seq_params))
        ]
        return torch.cat(sequences, dim=2)[0].transpose(0, 1).flatten(1)

    def _forward_context_parallel(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams | None,
    ) -> torch.Tensor:
        """Compute `forward` on shards of S or T, in the order of `context_parallel.py`."""
        assert self.cp_group is not None
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        key, value = (
            gather_from_sequence_parallel_region(tensor, group=self.cp_group)
            for tensor in (key, value)
        )
        bounds = [0, len(key)] if packed is None else _sequence_bounds(packed)
        positions_per_rank = [
            torch.cat(
                [
                    begin + local_positions(other, cp, end - begin, query.device)
                    for begin, end in itertools.pairwise(bounds)
                ]
            )
            for other in range(cp)
        ]
        query_positions, key_positions = positions_per_rank[rank], torch.cat(positions_per_rank)
        mask = key_positions[None] <= query_positions[:, None]
        if packed is not None:
            starts = torch.tensor(bounds, device=query.device)
            sequence = torch.bucketize(query_positions, starts[1:], right=True)
            mask &= key_positions[None] >= starts[sequence][:, None]
        if self.left is not None:
            mask &= query_positions[:, None] - key_positions[None] <= self.left
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
        """Compute attention of one sequence: [B, N, S, D] and [B, G, keys, D] -> [B, N, S, D].

        Args:
            query, key, value: see above.
            mask: [S, keys] bool; None: causal, with the layer's window.
        """
        length = query.shape[2]
        # The window of a shorter sequence excludes nothing.
        if mask is None and self.left is not None and length > self.left + 1:
            mask = _sliding_window_mask(length, self.left, query.device)
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
