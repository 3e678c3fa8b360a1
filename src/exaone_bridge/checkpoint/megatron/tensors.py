"""A model's tensors by their Hugging Face names, read one at a time: of a Hugging Face folder or a Megatron checkpoint.

    >>> source = open_tensors(Path("/checkpoints/exaone"))
    >>> for name in source.tensors:
    ...     weight = source.read(name)

Nothing is held but the tensor at hand and, of a Megatron checkpoint, the parameter it is part of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from exaone_bridge.checkpoint.hf.headers import TensorInfo, TensorSpec
from exaone_bridge.checkpoint.hf.source import HFSource, plan_of
from exaone_bridge.checkpoint.megatron.torch_dist import StoredTensor, TorchDist, key_of
from exaone_bridge.checkpoint.reshard.plan import ParamPlan
from exaone_bridge.errors import CheckpointError
from exaone_bridge.models import family_of
from exaone_bridge.schema.hf_files import iteration_folder
from exaone_bridge.schema.model_family import ModelFamily
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["DTYPES", "FolderSource", "MegatronSource", "Spec", "TensorSource", "TensorSpec"]

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}


class TensorSource(Protocol):
    """A model whose tensors can be read one at a time."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def family(self) -> ModelFamily: ...
    @property
    def model_config(self) -> Any: ...
    @property
    def tensors(self) -> Mapping[str, TensorSpec]: ...
    def read(self, name: str) -> torch.Tensor: ...


class FolderSource:
    """A Hugging Face folder's tensors, those carried beside the model included, in the order of its files."""

    def __init__(self, source: HFSource) -> None:
        self.source = source
        self.config, self.family, self.model_config = (
            source.config,
            source.family,
            source.model_config,
        )
        self.tensors: Mapping[str, TensorInfo] = source.tensors

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=DTYPES[info.dtype])
        read_into(info, tensor)
        return tensor


def read_into(info: TensorInfo, tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor with a whole tensor of a file."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if info.nbytes else memoryview(b"")
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        at = 0
        while at < len(view):
            if not (read := file.readinto(view[at:])):
                raise CheckpointError(
                    info.file, f"ends within {info.name}", remedy="download or copy it again"
                )
            at += read


class Spec(NamedTuple):
    """A tensor that lies in no safetensors file yet."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


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
        self.model_config = self.family.read_hf_config(config)
        dtype = getattr(torch, self.model_config.dtype)
        plan = plan_of(self.family.mappings(self.model_config), self.model_config, Layout())
        self.tensors: dict[str, Spec] = {}
        self._places: dict[str, _Place] = {}
        for part in plan.parts:
            for held, (_, *names) in zip(part.mapping.numbers(), part.mapping.names(), strict=True):
                key, lead = self._locate(part, held)
                for index, (name, tensor) in enumerate(zip(names, part.mapping.hf, strict=True)):
                    kind = torch.float32 if tensor.fp32 else dtype
                    self.tensors[name] = Spec(name, _SPELLED[kind], part.shapes[index])
                    self._places[name] = _Place(part, held, index, key, lead)

    def groups(self) -> list[list[str]]:
        """Names of tensors that lie in one parameter, which is read once for all of them if they come in order."""
        found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, place in self._places.items():
            found.setdefault((place.key, place.lead), []).append(name)
        return list(found.values())

    def _locate(self, part: ParamPlan, numbers: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        shape = part.cuts[0].shape
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
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        before = tuple((number, number + 1) for number in place.lead)
        for copy in place.part.cuts[0].copies:
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
