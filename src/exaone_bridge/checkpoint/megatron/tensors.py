"""A Megatron checkpoint's tensors by their Hugging Face names, read one at a time.

Only the tensor at hand, and the parameter that it is part of, are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from exaone_bridge.checkpoint.dtypes import SAFETENSORS_NAMES, TORCH_DTYPES
from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.megatron.torch_dist import StoredTensor, TorchDist, key_of
from exaone_bridge.checkpoint.reshard.plan import ParamPlan, reshard_plan
from exaone_bridge.errors import CheckpointError
from exaone_bridge.models import family_of
from exaone_bridge.schema.hf_files import iteration_folder
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["MegatronSource"]


class _Place(NamedTuple):
    part: ParamPlan
    numbers: tuple[int, ...]
    tensor: int
    key: str
    lead: tuple[int, ...]


class MegatronSource:
    """A Megatron checkpoint's model tensors as Hugging Face has them, whatever layout wrote it; no model is built.

    Optimizer states and extra states are not looked at. Tensors that travel beside the model are not among them:
    `convert/extra_tensors.py` has those.

    Args:
        path: the checkpoint's folder, or that of one iteration.
        config: the Hugging Face configuration it stands for.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one that lacks a parameter or has it in another shape.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.folder = iteration_folder(path)
        self.config = config
        self.stored = TorchDist(self.folder)
        self.family = family_of(config["architectures"], where=str(path)).variant_with(
            self.stored.tensors
        )
        self.model = self.family.describe(config)
        self.model_config = self.model.config
        dtype = getattr(torch, self.model_config.dtype)
        plan = reshard_plan(self.model, Layout())
        self.tensors: dict[str, TensorSpec] = {}
        self._places: dict[str, _Place] = {}
        for part in plan.params:
            for held, (_, *names) in zip(part.mapping.numbers(), part.mapping.names(), strict=True):
                key, lead = self._locate(part, held)
                for index, (name, tensor) in enumerate(zip(names, part.mapping.hf, strict=True)):
                    kind = torch.float32 if tensor.fp32 else dtype
                    self.tensors[name] = TensorSpec(
                        name, SAFETENSORS_NAMES[kind], part.shapes[index]
                    )
                    self._places[name] = _Place(part, held, index, key, lead)

    def groups(self) -> list[list[str]]:
        """Names of tensors that lie in one parameter, which is read once for all of them if they come in order."""
        found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, place in self._places.items():
            found.setdefault((place.key, place.lead), []).append(name)
        return list(found.values())

    def _locate(self, part: ParamPlan, numbers: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        shape = part.shards[0].shape
        key, lead = key_of(part.mapping, numbers, stacked=False)
        if key not in self.stored.tensors:
            key, lead = key_of(part.mapping, numbers, stacked=True)
        stored = self.stored.tensors.get(key)
        if stored is None:
            raise CheckpointError(
                self.folder,
                f"{key_of(part.mapping, numbers, stacked=False)[0]} is not in it",
                remedy="restore the checkpoint",
            )
        if not _fits(stored, lead, shape, may_be_padded=part.mapping.kind == "vocab"):
            wanted = f"{list(shape)} at {list(lead)}" if lead else str(list(shape))
            problem = (
                f"{key} has shape {list(stored.shape)}, and the configuration makes it {wanted}"
            )
            raise CheckpointError(
                self.folder, problem, remedy="check that run_config.yaml belongs to these weights"
            )
        return key, lead

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in the type that the configuration says, in memory of its own.

        Raises:
            CheckpointError: files that are missing or damaged.
        """
        place, spec = self._places[name], self.tensors[name]
        tensor = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        before = tuple((number, number + 1) for number in place.lead)
        for copy in place.part.shards[0].copies:
            if copy.tensor == place.tensor:
                target = tensor[tuple(slice(begin, end) for begin, end in copy.hf)]
                shaped = target.view(
                    (1,) * len(before) + tuple(end - begin for begin, end in copy.megatron)
                )
                self.stored.read_into(shaped, place.key, place.lead, (*before, *copy.megatron))
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
