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

from exaone_bridge.schema.param_mapping import MappingKind, ParamMapping

__all__ = ["Registry", "SqueezedMapping", "VocabularyMapping", "bind"]


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

    def hf_to_megatron(
        self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module
    ) -> torch.Tensor:
        """[V, H] -> this rank's [padded V / tp, H]; or a bias, [V] -> [padded V / tp]."""
        here = getattr(megatron_module, self.megatron_param.rpartition(".")[2]).shape[0]
        missing = max(0, here * self.tp_size - hf_weights.shape[0])
        padded = torch.nn.functional.pad(hf_weights, (0, 0) * (hf_weights.ndim - 1) + (0, missing))
        return super().hf_to_megatron(padded, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """The ranks' cuts -> [V, H] on every rank."""
        gathered = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: weight[: self.vocab_size] for name, weight in gathered.items()}


class SqueezedMapping(ReplicatedMapping):
    """A tensor with a leading axis of one that Megatron-Core's has not: [1, N] <-> [N], whole on every rank."""

    def hf_to_megatron(
        self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module
    ) -> torch.Tensor:
        """[1, N] -> [N]."""
        return super().hf_to_megatron(hf_weights.squeeze(0), megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """[N] -> [1, N]."""
        whole = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: weight.unsqueeze(0) for name, weight in whole.items()}


class Registry(MegatronMappingRegistry):
    """The host's registry, without its guesses: it has other names for fused norms try to find an AutoMapping."""

    def _add_separate_layernorm_mappings(self) -> None:
        return None


def _bind(mapping: ParamMapping, megatron: str, vocab_size: int | None) -> MegatronParamMapping:
    names = [tensor.name for tensor in mapping.hf]
    match mapping.kind:
        case MappingKind.QKV:
            return QKVMapping(megatron, *names)
        case MappingKind.GATED:
            return GatedMLPMapping(megatron, *names)
        case MappingKind.VOCAB:
            return VocabularyMapping(megatron, names[0], vocab_size)
        case MappingKind.COLUMN:
            return ColumnParallelMapping(megatron, *names)
        case MappingKind.ROW:
            return RowParallelMapping(megatron, *names)
        case MappingKind.REPLICATED:
            return ReplicatedMapping(megatron, *names)
        case MappingKind.SQUEEZED:
            return SqueezedMapping(megatron, *names)


def bind(mappings: Iterable[ParamMapping], vocab_size: int | None) -> MegatronMappingRegistry:
    """The registry that Megatron-Bridge converts with.

    Args:
        rows: a family's table.
        vocab_size: words without padding.
    """
    named = ((mapping, name) for mapping in mappings for name in (mapping.megatron, mapping.alias))
    return Registry(
        *(_bind(mapping, name, vocab_size) for mapping, name in named if name is not None)
    )
