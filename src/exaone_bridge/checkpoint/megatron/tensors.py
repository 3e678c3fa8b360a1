"""A Megatron checkpoint's tensors by their Hugging Face names, read one at a time.

Only the tensor at hand, and the parameter that it is part of, are in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from exaone_bridge.checkpoint.coverage import check_coverage
from exaone_bridge.checkpoint.dtypes import TORCH_DTYPES
from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.megatron.torch_dist import StoredTensor, TorchDist, key_of
from exaone_bridge.checkpoint.reshard.plan import ParamPlan, reshard_plan
from exaone_bridge.errors import CheckpointError
from exaone_bridge.models import family_of
from exaone_bridge.schema.dtypes import SAFETENSORS_DTYPES
from exaone_bridge.schema.iterations import iteration_folder
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["MegatronCheckpoint"]


class _Place(NamedTuple):
    """Where a Hugging Face tensor is: in which parameter, and where that is stored.

    Attributes:
        tensor: Its index in the parameter's mapping.
        key: The stored tensor.
        lead: The parameter's indices along the leading axes of `key`.
    """

    param: ParamPlan
    tensor: int
    key: str
    lead: tuple[int, ...]


class MegatronCheckpoint:
    """The model tensors of a Megatron checkpoint as Hugging Face has them, at any layout.

    No model is built. Optimizer states and extra states are not read. Passthrough tensors are not
    among the tensors: `convert/extra_tensors.py` has them.

    Attributes:
        model: The description of the model.
        tensors: Name -> name, dtype and shape of every Hugging Face tensor.
        stored: The tensors on disk.
    """

    def __init__(self, path: Path, config: JSONMapping, provider: object = None) -> None:
        """Read the metadata of a checkpoint.

        Args:
            path: The checkpoint's folder, or that of one iteration.
            config: The Hugging Face config of the model.
            provider: The provider in its run config, for what config.json does not say.

        Raises:
            CheckpointError: There is no checkpoint, it is damaged, or a parameter has another
                shape than the config gives it.
            UnmappedTensors: Keys are missing.
        """
        self.folder = iteration_folder(path)
        self.stored = TorchDist(self.folder)
        family = family_of(config["architectures"], where=str(path))
        self.model = family.variant_with(self.stored.tensors).describe(config, provider=provider)
        self.tensors: dict[str, TensorSpec] = {}
        self._places: dict[str, _Place] = {}
        missing: list[str] = []
        for param in reshard_plan(self.model, Layout()).params:
            mapping = param.mapping
            for indices, (_, *names) in zip(mapping.numbers(), mapping.names(), strict=True):
                if (found := self._locate(param, indices)) is None:
                    missing.append(key_of(mapping, indices, stacked=False)[0])
                    continue
                for index, (name, tensor) in enumerate(zip(names, mapping.hf, strict=True)):
                    dtype = SAFETENSORS_DTYPES[tensor.dtype(self.model.config.dtype)]
                    self.tensors[name] = TensorSpec(name, dtype, param.shapes[index])
                    self._places[name] = _Place(param, index, *found)
        check_coverage(missing, (), where=self.folder, remedy="restore the checkpoint")

    def groups(self) -> list[list[str]]:
        """Return the names by parameter; one that is read in order is read from disk once."""
        found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, place in self._places.items():
            found.setdefault((place.key, place.lead), []).append(name)
        return list(found.values())

    def _locate(
        self, param: ParamPlan, indices: tuple[int, ...]
    ) -> tuple[str, tuple[int, ...]] | None:
        """Find the stored tensor of a parameter, and its indices along the leading axes there."""
        key, lead = key_of(param.mapping, indices, stacked=False)
        if key not in self.stored.tensors:
            key, lead = key_of(param.mapping, indices, stacked=True)
        if (stored := self.stored.tensors.get(key)) is None:
            return None
        shape = param.shards[0].shape
        if not _fits(stored, lead, shape, may_be_padded=param.mapping.kind == "vocab"):
            expected = f"{list(shape)} at {list(lead)}" if lead else str(list(shape))
            raise CheckpointError(
                self.folder,
                f"{key} has shape {list(stored.shape)}, and the config makes it {expected}",
                remedy="check that run_config.yaml belongs to these weights",
            )
        return key, lead

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own, in the dtype that the config gives it.

        Returns:
            `[*tensors[name].shape]`, contiguous and on the CPU.

        Raises:
            CheckpointError: A file is missing or damaged.
        """
        place, spec = self._places[name], self.tensors[name]
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        leading = tuple((index, index + 1) for index in place.lead)
        for copy in place.param.shards[0].copies:
            if copy.tensor == place.tensor:
                target = tensor[tuple(slice(begin, end) for begin, end in copy.hf)]
                lengths = tuple(end - begin for begin, end in copy.megatron)
                target = target.view((1,) * len(leading) + lengths)
                self.stored.read_into(target, place.key, place.lead, (*leading, *copy.megatron))
        return tensor


def _fits(
    stored: StoredTensor, lead: tuple[int, ...], shape: tuple[int, ...], *, may_be_padded: bool
) -> bool:
    if len(stored.shape) != len(lead) + len(shape):
        return False
    outer, inner = stored.shape[: len(lead)], stored.shape[len(lead) :]
    if may_be_padded:
        inner = (min(inner[0], shape[0]), *inner[1:])
    return inner == shape and all(at < length for at, length in zip(lead, outer, strict=True))
