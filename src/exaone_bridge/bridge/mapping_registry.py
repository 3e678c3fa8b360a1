"""Makes Megatron-Bridge's mapping objects of parameter mappings.

A parameter mapping states its kind, so nothing is detected from a module at run time, and all
ranks agree on it before any collective.
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

__all__ = ["SqueezedMapping", "VocabularyMapping", "make_mapping_registry"]


class VocabularyMapping(ColumnParallelMapping):
    """Maps an embedding or output layer; it has zeros as vocabulary padding, and exports none.

    `ColumnParallelMapping` (0.6.2) pads at tp > 1 only, and never removes the padding.
    """

    def __init__(self, megatron_param: str, hf_param: str, vocab_size: int | None = None) -> None:
        """Make a mapping.

        Args:
            megatron_param: name of the Megatron-Core parameter.
            hf_param: name of the Hugging Face tensor.
            vocab_size: rows without padding; None: the export keeps the padding.
        """
        super().__init__(megatron_param, hf_param)
        self.vocab_size = vocab_size

    def resolve(self, captures: tuple[str, ...]) -> VocabularyMapping:
        """Replace the wildcards in both names."""
        megatron_param, hf_param = self._resolve_names(captures)
        return type(self)(megatron_param, hf_param, self.vocab_size)

    def hf_to_megatron(
        self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module
    ) -> torch.Tensor:
        """Shard [V, H] -> this rank's [padded V / tp, H]; or a bias, [V] -> [padded V / tp]."""
        local = getattr(megatron_module, self.megatron_param.rpartition(".")[2]).shape[0]
        padding = max(0, local * self.tp_size - hf_weights.shape[0])
        padded = torch.nn.functional.pad(hf_weights, (0, 0) * (hf_weights.ndim - 1) + (0, padding))
        return super().hf_to_megatron(padded, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """Gather [padded V / tp, H] on each rank -> [V, H] on every rank; or a bias."""
        gathered = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: weight[: self.vocab_size] for name, weight in gathered.items()}


class SqueezedMapping(ReplicatedMapping):
    """Maps a replicated tensor whose leading axis of size 1 Megatron-Core does not have."""

    def hf_to_megatron(
        self, hf_weights: torch.Tensor, megatron_module: torch.nn.Module
    ) -> torch.Tensor:
        """Squeeze [1, N] -> [N]."""
        return super().hf_to_megatron(hf_weights.squeeze(0), megatron_module)

    def megatron_to_hf(
        self, megatron_weights: torch.Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, torch.Tensor]:
        """Unsqueeze [N] -> [1, N] on every rank."""
        weights = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: weight.unsqueeze(0) for name, weight in weights.items()}


class _ExactRegistry(MegatronMappingRegistry):
    """A registry without guesses: Megatron-Bridge's also tries other names of fused norms."""

    def _add_separate_layernorm_mappings(self) -> None:
        return None


def make_mapping_registry(
    mappings: Iterable[ParamMapping], vocab_size: int | None
) -> MegatronMappingRegistry:
    """Make the registry that Megatron-Bridge converts with.

    Args:
        mappings: those of one model.
        vocab_size: rows of the vocabulary without padding; None: the export keeps the padding.
    """
    named = ((mapping, name) for mapping in mappings for name in (mapping.megatron, mapping.alias))
    return _ExactRegistry(
        *(_megatron_mapping(mapping, name, vocab_size) for mapping, name in named if name)
    )


def _megatron_mapping(
    mapping: ParamMapping, megatron: str, vocab_size: int | None
) -> MegatronParamMapping:
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
