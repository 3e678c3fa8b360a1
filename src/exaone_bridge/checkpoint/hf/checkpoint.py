"""A Hugging Face model folder, opened once: its config, the model it describes, its tensors.

Opening reads `config.json` and the safetensors headers only, and imports no torch.

    >>> checkpoint = HFCheckpoint.open(Path("/checkpoints/exaone"))
    >>> for name in checkpoint.tensors:
    ...     weight = checkpoint.read(name)
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exaone_bridge.checkpoint.coverage import check_coverage
from exaone_bridge.checkpoint.hf.accept import (
    check_redundant,
    dtype_of_weights,
    in_model_dtypes,
    names_dtype,
)
from exaone_bridge.checkpoint.hf.diagnose import check_config, check_is_hf_folder, explain
from exaone_bridge.checkpoint.hf.headers import INDEX, TensorInfo, read_headers, read_json
from exaone_bridge.checkpoint.hf.reader import TensorReader
from exaone_bridge.errors import CheckpointError
from exaone_bridge.models import family_of
from exaone_bridge.schema.dtypes import DTYPE_BYTES, SAFETENSORS_DTYPES
from exaone_bridge.schema.hf_spelling import write_dtype
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.model_family import ModelDescription, ModelFamily
from exaone_bridge.schema.param_mapping import ParamMapping

if TYPE_CHECKING:
    import torch

__all__ = ["HFCheckpoint", "check_shape"]

_SHAPE = operator.attrgetter("shape")


@dataclass(frozen=True, slots=True)
class HFCheckpoint:
    """A checked Hugging Face folder: its config, its model and its tensors, which it can read.

    Forked processes may use it too.

    Attributes:
        config: `config.json`, with the weights' dtype if it names none.
        model: The description of the model that the family makes of it.
        tensors: Every tensor by name: files in name order, tensors by offset within a file. Those
            of another dtype than the model's are cast when they are read.
        passthrough: Those of `tensors` that travel from source to export untouched.
        unexpected: Those that the model does not have either; `open` accepts none.
        missing: Name -> shape of tensors that the model has and the folder lacks; `open` accepts
            none.
        notes: Sentences about what differs from the config, and was accepted because no value
            changes: duplicates that are left out, casts, a missing dtype.
        reader: Reads the tensors.
    """

    folder: Path
    config: JSONMapping
    model: ModelDescription
    tensors: Mapping[str, TensorInfo]
    passthrough: Mapping[str, TensorInfo]
    unexpected: Mapping[str, TensorInfo]
    missing: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    reader: TensorReader = field(default_factory=TensorReader, compare=False, repr=False)

    @classmethod
    def open(cls, folder: Path, family: ModelFamily | None = None) -> HFCheckpoint:
        """Read and check a folder, so that a load finds every tensor in the right shape and dtype.

        Command line and AutoBridge both open a folder here, so that they accept the same.

        Args:
            folder: The folder.
            family: A variant of the family; None: that of the architecture in config.json.

        Raises:
            CheckpointError: See `survey`.
            UnsupportedConfig: See `survey`.
            UnmappedTensors: Keys are missing, or there are unexpected keys.
        """
        checkpoint = cls.survey(folder, family)
        checkpoint.check_coverage()
        return checkpoint

    @classmethod
    def survey(cls, folder: Path, family: ModelFamily | None = None) -> HFCheckpoint:
        """Read a folder as `open` does, but let keys be missing or unexpected.

        Shapes, dtypes and duplicates are checked only where the keys are those of the model.

        Raises:
            CheckpointError: A file is missing, damaged or unsafe, a tensor has another shape than
                config.json says, a cast to its dtype would change a value, or a duplicate differs.
            UnsupportedConfig: A config that is not supported, or an unknown architecture.
        """
        check_is_hf_folder(folder)
        path = folder / "config.json"
        config = read_json(path)
        check_config(config, path)
        family = family or family_of(config.get("architectures"), where=str(path))
        model = family.describe(config)
        tensors = read_headers(folder)
        notes: list[str] = []
        if not names_dtype(config) and (found := dtype_of_weights(model, tensors)) is not None:
            write_dtype(config, found[0])
            model = family.describe(config)
            notes.append(found[1])
        _check_other_weights(
            folder, {file.name for file in {each.file for each in tensors.values()}}
        )
        if family.optional_fp32 is not None:
            dtypes = ((info.name, info.dtype) for info in tensors.values())
            model = family.describe(config, dtypes=dtypes)
        expected = model.hf_shapes
        others = sorted(tensors.keys() - expected.keys())
        redundant = {name: tensors[name] for name in others if model.is_redundant(name)}
        others = [name for name in others if name not in redundant]
        passthrough = {name: tensors[name] for name in others if model.is_passthrough(name)}
        unexpected = {name: tensors[name] for name in others if name not in passthrough}
        missing = {name: expected[name] for name in sorted(expected.keys() - tensors.keys())}
        if not missing and not unexpected:
            notes += check_redundant(model, tensors, redundant)
            if not _as_expected(model, tensors):
                for name, shape in expected.items():
                    check_shape(tensors[name], shape)
                cast, casts = in_model_dtypes(model, tensors)
                tensors |= cast
                notes += casts
        if redundant:
            tensors = {name: info for name, info in tensors.items() if name not in redundant}
        return cls(folder, config, model, tensors, passthrough, unexpected, missing, tuple(notes))

    @property
    def family(self) -> ModelFamily:
        """The family of the model."""
        return self.model.family

    @property
    def model_config(self) -> Any:
        """The model config."""
        return self.model.config

    @property
    def mappings(self) -> tuple[ParamMapping, ...]:
        """The parameter mappings of the model."""
        return self.model.mappings

    @property
    def model_tensors(self) -> Mapping[str, TensorInfo]:
        """Those of `tensors` that are neither passthrough tensors nor unexpected."""
        others = self.passthrough.keys() | self.unexpected.keys()
        if not others:
            return self.tensors
        return {name: info for name, info in self.tensors.items() if name not in others}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of `model_tensors`."""
        tensors = self.model_tensors
        return dict(zip(tensors, map(_SHAPE, tensors.values()), strict=True))

    @property
    def files(self) -> dict[str, str]:
        """Tensor -> name of its file."""
        return {name: info.file.name for name, info in self.tensors.items()}

    @property
    def num_elements(self) -> int:
        """Elements of all tensors."""
        return sum(info.nbytes // DTYPE_BYTES[info.dtype] for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def check_coverage(self) -> None:
        """Raise if the folder does not have the tensors of the model.

        Raises:
            UnmappedTensors: Keys are missing, or there are unexpected keys.
        """
        # Names that both sides have need no second look.
        remedy = explain(self.missing, self.unexpected)
        check_coverage(self.missing, self.unexpected, where=self.folder, remedy=remedy)

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor [...] into memory of its own; see `TensorReader.read`."""
        return self.reader.read(self.tensors[name])

    def view(self, name: str) -> torch.Tensor:
        """Map a tensor [...] without reading it; see `TensorReader.view`."""
        return self.reader.view(self.tensors[name])

    def read_into(self, name: str, target: torch.Tensor | memoryview, begin: int = 0) -> None:
        """Fill a tensor [...], or its bytes, from `begin` on; see `TensorReader.read_into`."""
        self.reader.read_into(self.tensors[name], target, begin)

    def release(self, name: str) -> None:
        """Give the pages of a viewed tensor back; see `TensorReader.release`."""
        self.reader.release(self.tensors[name])


def check_shape(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    """Raise if a tensor has another shape than the config gives it.

    Raises:
        CheckpointError: It has.
    """
    if tensor.shape != shape:
        raise CheckpointError(
            tensor.file,
            f"tensor {tensor.name} has shape {list(tensor.shape)}, "
            f"and config.json makes it {list(shape)}",
            remedy="check that config.json belongs to these weights",
        )


def _check_other_weights(folder: Path, checked: set[str]) -> None:
    """Raise if Megatron-Bridge, which reads by an index or else every file, would read others."""
    others = {path.name for path in folder.glob("*.safetensors")} - checked
    if "model.safetensors" in checked and (folder / INDEX).exists():
        others.add(INDEX)
    if others:
        raise CheckpointError(
            folder,
            f"beside the weights ({_some(checked)}) there are others ({_some(others)})",
            remedy="move away those that do not belong to the model",
        )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _as_expected(model: ModelDescription, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether all tensors of the model have its shapes and dtypes.

    It is one comparison of all, because 60,000 calls would take long.
    """
    expected, fp32 = model.hf_shapes, model.fp32_names
    model_dtype = SAFETENSORS_DTYPES[model.config.dtype]
    found = [tensors[name] for name in expected]
    of_other_dtype = {info.name for info in found if info.dtype != model_dtype}
    dtypes_match = of_other_dtype <= fp32 and all(tensors[name].dtype == "F32" for name in fp32)
    return dtypes_match and list(map(_SHAPE, found)) == list(expected.values())
