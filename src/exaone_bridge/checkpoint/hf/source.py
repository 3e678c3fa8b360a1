"""A Hugging Face model folder, read and checked from its config and its safetensors headers alone. No torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.headers import (
    INDEX,
    TensorInfo,
    read_headers,
    read_json,
)
from exaone_bridge.checkpoint.reshard.plan import Plan, make_plan
from exaone_bridge.errors import CheckpointError, UnmappedTensors, UnsupportedConfig
from exaone_bridge.models import family_of
from exaone_bridge.schema.dtypes import DTYPE_BYTES, SAFETENSORS_DTYPES, itemsize
from exaone_bridge.schema.model_family import ModelConfig, ModelFamily
from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import ParamMapping, expected_hf, fp32_names

__all__ = [
    "HFSource",
    "check_layout",
    "open_source",
    "plan_of",
    "refuse_names",
    "refuse_shape",
    "survey",
]

_BELONGS = "check that config.json belongs to these weights"
_SHAPE = operator.attrgetter("shape")


@dataclass(frozen=True, slots=True)
class HFSource:
    """A checked Hugging Face folder: its configuration, its family's facts and rows, and where each tensor lies.

    Attributes:
        carried: those of `tensors` that are no part of the model, and travel beside it.
        unclaimed: those that are neither; no source that `open_source` returns has any.
        missing: name -> shape of tensors that the model needs and the folder lacks; nor these.
    """

    folder: Path
    config: Mapping[str, Any]
    family: ModelFamily
    model_config: Any
    mappings: tuple[ParamMapping, ...]
    tensors: Mapping[str, TensorInfo]
    passthrough: Mapping[str, TensorInfo]
    unexpected: Mapping[str, TensorInfo]
    missing: Mapping[str, tuple[int, ...]]

    @property
    def of_the_model(self) -> Mapping[str, TensorInfo]:
        """Those of `tensors` that are neither carried nor unclaimed."""
        others = self.passthrough.keys() | self.unexpected.keys()
        return (
            {name: info for name, info in self.tensors.items() if name not in others}
            if others
            else self.tensors
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of those."""
        ours = self.of_the_model
        return dict(zip(ours, map(_SHAPE, ours.values()), strict=True))

    def check_names(self) -> None:
        """Refuse a folder whose tensors are not those of the model.

        Raises:
            UnmappedTensors: see `refuse_names`.
        """
        refuse_names(self.folder, self.missing, self.unexpected)

    def plan(self, layout: Layout) -> Plan:
        """Which rectangles go where at this layout.

        Raises:
            UnsupportedLayout: an axis that the layout does not cut evenly.
        """
        return plan_of(self.mappings, self.model_config, layout)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.nbytes // DTYPE_BYTES[tensor.dtype] for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def refuse_names(folder: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a folder whose tensors are not those of the model; it is fine where there are none of either.

    Raises:
        UnmappedTensors: tensors that the model needs and the folder lacks, or the other way round.
    """
    if missing := set(missing):
        what, remedy = "tensors that the model needs are missing", "download or copy it again"
        raise UnmappedTensors(what, missing, where=str(folder), remedy=remedy)
    if unexpected := set(unexpected):
        what = "tensors that the model has no place for"
        raise UnmappedTensors(what, unexpected, where=str(folder), remedy=_BELONGS)


def refuse_shape(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape than the configuration makes it.

    Raises:
        CheckpointError: it has one.
    """
    if tensor.shape != shape:
        problem = f"tensor {tensor.name} has shape {list(tensor.shape)}, and config.json makes it {list(shape)}"
        raise CheckpointError(tensor.file, problem, remedy=_BELONGS)


def open_source(folder: Path) -> HFSource:
    """Read and check a Hugging Face folder: after this, a load finds every tensor, in the right shape and type.

    Raises:
        CheckpointError, UnsupportedConfig: see `survey`.
        UnmappedTensors: see `HFSource.check_names`.
    """
    source = survey(folder)
    source.check_names()
    return source


def survey(folder: Path) -> HFSource:
    """The same, but that the folder may lack tensors of the model, or have others; then shapes are not looked at.

    Raises:
        CheckpointError: a missing, damaged or unsafe file, or a tensor of another shape or type than config.json says.
        UnsupportedConfig: a configuration that is not modelled, or an architecture that nobody claims.
    """
    if not folder.is_dir():
        raise CheckpointError(
            folder, "this folder does not exist", remedy="name a Hugging Face model folder"
        )
    path = folder / "config.json"
    config = read_json(path)
    family = _family(config, path)
    model_config = family.read_hf_config(config)
    mappings = family.mappings(model_config)
    tensors = read_headers(folder)
    _check_nothing_else(folder, {file.name for file in {info.file for info in tensors.values()}})
    expected = expected_hf(mappings, model_config.dims)
    others = sorted(tensors.keys() - expected.keys())
    passthrough = {name: tensors[name] for name in others if family.is_passthrough(name)}
    unexpected = {name: tensors[name] for name in others if name not in passthrough}
    missing = {name: expected[name] for name in sorted(expected.keys() - tensors.keys())}
    if not missing and not unexpected:
        _check_shapes(
            expected, SAFETENSORS_DTYPES[model_config.dtype], fp32_names(mappings), tensors
        )
    return HFSource(
        folder, config, family, model_config, mappings, tensors, passthrough, unexpected, missing
    )


def _family(config: Mapping[str, Any], path: Path) -> ModelFamily:
    if "auto_map" in config:
        raise UnsupportedConfig(
            "auto_map",
            got=config["auto_map"],
            wanted="absent, because it asks to run Python code that came with the checkpoint (trust_remote_code)",
            where=str(path),
            remedy="take it out of config.json if Transformers has the architecture: no remote code is run here",
        )
    return family_of(config.get("architectures"), where=str(path))


def _check_nothing_else(folder: Path, checked: set[str]) -> None:
    """Megatron-Bridge reads by an index if there is one, else every safetensors file: it must find what we checked."""
    others = {path.name for path in folder.glob("*.safetensors")} - checked
    if "model.safetensors" in checked and (folder / INDEX).exists():
        others.add(INDEX)
    if others:
        raise CheckpointError(
            folder,
            f"beside the weights ({_few(checked)}) it holds others ({_few(others)})",
            remedy="move away those that do not belong to the model",
        )


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]],
    model_dtype: str,
    fp32: set[str],
    tensors: Mapping[str, TensorInfo],
) -> None:
    found = [tensors[name] for name in expected]
    others = {info.name for info in found if info.dtype != model_dtype}
    types_hold = others <= fp32 and all(tensors[name].dtype == "F32" for name in fp32)
    if types_hold and list(map(_SHAPE, found)) == list(expected.values()):
        return  # the words for 60,000 tensors that hold would take long
    for name, shape in expected.items():
        tensor, dtype = tensors[name], "F32" if name in fp32 else model_dtype
        refuse_shape(tensor, shape)
        if tensor.dtype != dtype:
            why = "Transformers keeps it in" if name in fp32 else "config.json's dtype makes it"
            raise CheckpointError(
                tensor.file,
                f"tensor {name} has type {tensor.dtype}, and {why} {dtype}",
                remedy="convert it, or correct dtype in config.json",
            )


def plan_of(
    mappings: tuple[ParamMapping, ...], model_config: Any, layout: Layout, **options: Any
) -> Plan:
    """The plan of a model at a layout; `options`: further arguments of `make_plan`.

    Raises:
        UnsupportedLayout: an axis that the layout does not cut evenly.
    """
    return make_plan(
        mappings,
        model_config.dims,
        layout,
        layers=model_config.num_layers,
        experts=getattr(model_config, "num_experts", 0),
        itemsize=itemsize(model_config.dtype),
        tied=model_config.tied,
        **options,
    )


def check_layout(model_config: ModelConfig, layout: Layout) -> None:
    """Refuse a layout that the model cannot be cut into, before anything heavy is imported.

    Raises:
        UnsupportedLayout: see `Layout.check`.
    """
    layout.check(
        layers=model_config.num_layers,
        heads=model_config.num_heads,
        kv_heads=model_config.num_kv_heads,
        ffn=model_config.ffn_size,
        experts=getattr(model_config, "num_experts", 0),
        expert_ffn=getattr(model_config, "expert_ffn_size", 0),
    )
