"""Rows -> Megatron-Bridge's mapping objects.

The kind is stated by the row, so nothing has to be found out from a module at run time, and every rank of every
pipeline stage agrees on it before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)

from exaone_bridge.parts.rows import Kind, Row

__all__ = ["VocabularyMapping", "bind"]


class VocabularyMapping(ColumnParallelMapping):
    """Embedding or output layer: rows padded with zeros to what the layout needs, and cut off again at export.

    `ColumnParallelMapping` pads at tp > 1 only, and never cuts off.
    """

    def __init__(self, megatron_param: str, hf_param: str, vocab_size: int | None = None) -> None:
        super().__init__(megatron_param, hf_param)
        self.vocab_size = vocab_size

    def resolve(self, captures: tuple[str, ...]) -> VocabularyMapping:
        megatron_param, hf_param = self._resolve_names(captures)
        return type(self)(megatron_param, hf_param, self.vocab_size)

    def hf_to_megatron(self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module) -> torch.Tensor:
        """[V, H] -> this rank's [padded V / tp, H]."""
        if self.tp_size == 1:
            missing = megatron_module.weight.shape[0] - hf_weights.shape[0]
            return torch.nn.functional.pad(hf_weights, (0, 0, 0, max(0, missing)))
        return super().hf_to_megatron(hf_weights, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """The ranks' cuts -> [V, H] on every rank."""
        gathered = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: weight[: self.vocab_size] for name, weight in gathered.items()}


def _bind(row: Row, vocab_size: int | None) -> MegatronParamMapping:
    names = [tensor.name for tensor in row.hf]
    match row.kind:
        case Kind.QKV:
            return QKVMapping(row.megatron, *names)
        case Kind.GATED:
            return GatedMLPMapping(row.megatron, *names)
        case Kind.VOCAB:
            return VocabularyMapping(row.megatron, names[0], vocab_size)
        case Kind.COLUMN:
            return ColumnParallelMapping(row.megatron, *names)
        case Kind.ROW:
            return RowParallelMapping(row.megatron, *names)
        case Kind.REPLICATED:
            return ReplicatedMapping(row.megatron, *names)


def bind(rows: Iterable[Row], vocab_size: int | None) -> MegatronMappingRegistry:
    """The registry that Megatron-Bridge converts with.

    Args:
        rows: a family's table.
        vocab_size: words without padding.
    """
    return MegatronMappingRegistry(*(_bind(row, vocab_size) for row in rows))
