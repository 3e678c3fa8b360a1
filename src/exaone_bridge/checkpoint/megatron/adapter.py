"""Reads the adapter checkpoints of Megatron-Bridge's PEFT training, without a model.

Such a checkpoint has A [r, I] and B [O, r] of each adapted linear, where the linear itself would
be stored (`megatron/bridge/peft/utils.py`, 0.6.2). B's rows are those of the Megatron-Core weight,
so that the reshard plan says which of them belong to which Hugging Face tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from exaone_bridge.checkpoint.megatron.run_config import RUN_CONFIG, read_peft, read_run_config
from exaone_bridge.checkpoint.megatron.torch_dist import TorchDist, key_of
from exaone_bridge.checkpoint.reshard.plan import ParamPlan, reshard_plan
from exaone_bridge.errors import CheckpointError, UnmappedTensors, UnsupportedConfig
from exaone_bridge.schema.iterations import choose_iteration
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import MappingKind

__all__ = ["AdapterCheckpoint"]

_SCHEMES = ("LoRA", "VLMLoRA", "CanonicalLoRA", "DoRA", "LoadedLoRA", "LoadedCanonicalLoRA")
_A, _B, _MAGNITUDE = ".linear_in.weight", ".linear_out.weight", ".weight_magnitude"
# CanonicalLoRA has an adapter for each projection of a fused linear.
_PROJECTIONS = {
    MappingKind.QKV: ("adapter_q", "adapter_k", "adapter_v"),
    MappingKind.GATED: ("adapter_gate", "adapter_up"),
}
_ADAPTED = (MappingKind.COLUMN, MappingKind.ROW, MappingKind.REPLICATED, *_PROJECTIONS)
_REMEDY = "check that the adapter was trained on this model"


class _Part(NamedTuple):
    """Where the adapter of a Hugging Face tensor is.

    Attributes:
        param: The parameter that the tensor is a part of.
        tensor: Its index in the parameter's mapping.
        prefix: Of the keys of A and B.
        lead: The parameter's indices along their leading axes.
        outer: The lengths of those axes.
        alone: Whether A and B are those of this tensor, and not of the whole parameter.
    """

    param: ParamPlan
    tensor: int
    prefix: str
    lead: tuple[int, ...]
    outer: tuple[int, ...]
    alone: bool


class AdapterCheckpoint:
    """The adapters of a Megatron checkpoint by the Hugging Face tensors that they change.

    Attributes:
        folder: That of the iteration.
        peft: The fields of Megatron-Bridge's PEFT object.
        is_dora: Whether it is DoRA.
        note: Why this iteration was chosen, or nothing.
        names: The Hugging Face tensors that have an adapter, in the order of the mappings.
        head: The Hugging Face tensors of a head that was trained with the adapters, and their keys.
    """

    def __init__(self, path: Path, model: ModelDescription) -> None:
        """Read the metadata of an adapter checkpoint.

        Args:
            path: The checkpoint's folder, or that of one iteration.
            model: The model that it was trained on.

        Raises:
            CheckpointError: It is damaged, no adapter checkpoint, or that of another model.
            UnsupportedConfig: The adapters are of another kind than LoRA, CanonicalLoRA and DoRA.
            UnmappedTensors: There are adapters of other parameters than the model's linears.
        """
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(
                path,
                "is an adapter in PEFT's format, and a Megatron checkpoint is wanted",
                remedy="PEFT merges it itself (model.merge_and_unload())",
            )
        self.folder, self.note = choose_iteration(path)
        provider = read_run_config(self.folder, adapter=True)
        if provider.family.name != model.family.name:
            raise CheckpointError(
                path,
                f"is an adapter of {provider.family.name}, and the model is {model.family.name}",
                remedy=_REMEDY,
            )
        self.peft = read_peft(self.folder)
        scheme = str(self.peft.get("_target_")).rpartition(".")[2]
        if scheme not in _SCHEMES:
            raise UnsupportedConfig(
                "peft", got=scheme, known=_SCHEMES[:4], where=str(self.folder / RUN_CONFIG)
            )
        self.is_dora = scheme == "DoRA"
        self._layout, self._num_layers = provider.layout, model.config.num_layers
        self._stored = TorchDist(self.folder)
        self._parts: dict[str, _Part] = {}
        self.head: dict[str, str] = {}
        found: set[str] = set()
        for param in reshard_plan(model, Layout()).params:
            if model.config.head and param.mapping.megatron.startswith("output_layer."):
                self._find_head(param)
            elif param.mapping.kind in _ADAPTED and len(param.shapes[0]) == 2:
                found |= self._find(param)
        if others := self._stored.tensors.keys() - found - {*self.head.values()}:
            raise UnmappedTensors(
                "tensors that are no adapters of the model's linears",
                others,
                where=str(self.folder),
                remedy=_REMEDY + ", and adapts linears of its layers only",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that have an adapter, in the order of the mappings."""
        return tuple(self._parts)

    def _find(self, param: ParamPlan) -> set[str]:
        """Note the adapters of a mapping's parameters, and return their keys."""
        mapping, keys = param.mapping, set()
        projections = _PROJECTIONS.get(mapping.kind, ())
        for indices, (_, *names) in zip(mapping.numbers(), mapping.names(), strict=True):
            for stacked in (False, True):
                key, lead = key_of(mapping, indices, stacked=stacked)
                prefix = key.removesuffix(".weight") + ".adapter"
                sizes = (self._num_layers,) * stacked + (mapping.experts,)
                outer = sizes[: len(lead)]
                for tensor, name in enumerate(names):
                    whole = _Part(param, tensor, prefix, lead, outer, alone=len(names) == 1)
                    found = [whole]
                    if projections:
                        own = f"{prefix}.{projections[tensor]}"
                        found.append(whole._replace(prefix=own, alone=True))
                    for part in found:
                        if part.prefix + _A in self._stored.tensors:
                            keys |= self._check(part)
                            self._parts[name] = part
        return keys

    def _find_head(self, param: ParamPlan) -> None:
        """Note a tensor of the head, if the checkpoint has it."""
        key, name, shape = param.mapping.megatron, param.mapping.hf[0].name, param.shapes[0]
        if key not in self._stored.tensors:
            return
        self.head[name] = key
        if (found := self._shape(key)) != shape:
            raise CheckpointError(
                self.folder,
                f"{key} has shape {list(found)}, and the model makes it {list(shape)}",
                remedy=_REMEDY,
            )

    def _check(self, part: _Part) -> set[str]:
        """Return the keys of a part after comparing their shapes with the parameter's."""
        shape = part.param.shapes[part.tensor] if part.alone else part.param.shards[0].shape
        rows, columns = shape
        a, b = part.prefix + _A, part.prefix + _B
        found = {key: self._shape(key) for key in (a, b)}
        rank = found[a][-2] if len(found[a]) > 1 else 0
        wanted = {a: (*part.outer, rank, columns), b: (*part.outer, rows, rank)}
        if self.is_dora:
            found[part.prefix + _MAGNITUDE] = self._shape(part.prefix + _MAGNITUDE)
            wanted[part.prefix + _MAGNITUDE] = (*part.outer, rows)
        for key, expected in wanted.items():
            if found[key] != expected:
                raise CheckpointError(
                    self.folder,
                    f"{key} has shape {list(found[key])}, and the model makes it {list(expected)}",
                    remedy=_REMEDY + ", with adapters that experts do not share in part",
                )
        return set(wanted)

    def _shape(self, key: str) -> tuple[int, ...]:
        stored = self._stored.tensors.get(key)
        return () if stored is None else stored.shape

    def _read(self, key: str, lead: tuple[int, ...]) -> torch.Tensor:
        shape = self._stored.tensors[key].shape[len(lead) :]
        tensor = torch.empty(shape, dtype=self._stored.tensors[key].dtype)
        bounds = (*((index, index + 1) for index in lead), *((0, length) for length in shape))
        self._stored.read_into(tensor.view((1,) * len(lead) + shape), key, lead, bounds)
        return tensor

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A [r, I] and B [O, r] of a Hugging Face tensor [O, I]."""
        part = self._parts[name]
        a, b = (self._read(part.prefix + suffix, part.lead) for suffix in (_A, _B))
        if part.alone and part.param.mapping.kind is MappingKind.GATED:
            # Megatron-Bridge splits each rank's rows of one projection as if they were both's.
            b = _swapped(b, 2, self._num_shards(part))
        return a, b if part.alone else _rows(part, b)

    def magnitude(self, name: str) -> torch.Tensor:
        """Read DoRA's magnitude [O] of a Hugging Face tensor [O, I]."""
        part = self._parts[name]
        magnitude = self._read(part.prefix + _MAGNITUDE, part.lead)
        if part.param.mapping.kind is MappingKind.GATED:
            # Each rank's gate and up follow one another: Megatron-Bridge does not split them.
            magnitude = _swapped(magnitude, self._num_shards(part), 2)
        return magnitude if part.alone else _rows(part, magnitude)

    def _num_shards(self, part: _Part) -> int:
        return self._layout.expert_tp if part.param.is_expert else self._layout.tp

    def head_tensor(self, name: str) -> torch.Tensor:
        """Read a tensor of the trained head: weight [L, H] or bias [L]."""
        return self._read(self.head[name], ())

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Merge the adapter of a tensor [O, I], if it has one, in fp32 and rounded once.

        A tensor of a head that was trained with the adapters takes the place of the weight.

        LoRA is `W + s B A` with s = alpha / r; DoRA is `m (W + s B A) / norm(W + s B A)` with the
        norm of each row (equation 5 of https://arxiv.org/abs/2402.09353).
        """
        if name in self.head:
            return self.head_tensor(name).to(weight.dtype)
        if name not in self._parts:
            return weight
        a, b = (matrix.float() for matrix in self.matrices(name))
        merged = weight.float() + self.peft["alpha"] / a.shape[0] * (b @ a)
        if self.is_dora:
            merged *= self.magnitude(name).float()[:, None] / merged.norm(dim=1, keepdim=True)
        return merged.to(weight.dtype)

    def tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Yield (Hugging Face tensor, PEFT's suffix, tensor [r, I], [O, r] or [O])."""
        for name in self._parts:
            a, b = self.matrices(name)
            yield name, "lora_A.weight", a
            yield name, "lora_B.weight", b
            if self.is_dora:
                yield name, "lora_magnitude_vector", self.magnitude(name)


def _rows(part: _Part, tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of a Megatron-Core parameter that belong to the part's tensor, in order."""
    copies = [copy for copy in part.param.shards[0].copies if copy.tensor == part.tensor]
    copies.sort(key=lambda copy: copy.hf[0])
    return torch.cat([tensor[slice(*copy.megatron[0])] for copy in copies])


def _swapped(tensor: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    """Return the rows, which are stored as [outer, inner, ...], as [inner, outer, ...]."""
    blocks = tensor.reshape(outer, inner, -1, *tensor.shape[1:])
    return blocks.transpose(0, 1).reshape(tensor.shape)
