"""Loads an adapter of PEFT into Megatron-Core, to go on training it.

PEFT has an adapter for each projection. Megatron-Bridge's LoRA has one for a fused linear, with one
matrix A for its projections; its CanonicalLoRA has one for each projection, as PEFT does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.lora import LoRA
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model
from safetensors.torch import load_file

from exaone_bridge.bridge.eligibility import local_model
from exaone_bridge.checkpoint.hf.headers import read_json
from exaone_bridge.checkpoint.reshard.load import plan_local
from exaone_bridge.checkpoint.reshard.plan import LocalParam
from exaone_bridge.errors import CheckpointError, UnmappedTensors, UnsupportedConfig
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.json_types import JSONObject
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.param_mapping import MappingKind

__all__ = ["LoadedCanonicalLoRA", "LoadedLoRA", "lora_from_peft"]

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Hugging Face's projections, the linears of Megatron-Core, and those of CanonicalLoRA.
_FUSED = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_fc1": ("gate_proj", "up_proj"),
}
_LINEARS = {"o_proj": "linear_proj", "down_proj": "linear_fc2"}
_CANONICAL = {
    **{"q_proj": "linear_q", "k_proj": "linear_k", "v_proj": "linear_v"},
    **{"gate_proj": "linear_fc1_gate", "up_proj": "linear_fc1_up"},
}
_ADAPTERS = {
    MappingKind.QKV: ("adapter_q", "adapter_k", "adapter_v"),
    MappingKind.GATED: ("adapter_gate", "adapter_up"),
}
_Matrices = Mapping[str, torch.Tensor]


@dataclass
class LoadedLoRA(LoRA):
    """Megatron-Bridge's LoRA, which begins with the adapter of PEFT in the folder `peft_folder`."""

    peft_folder: str = ""

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Add the adapters to the chunks of a model and load them, without a collective."""
        return _load(super().__call__(model, training=training), Path(self.peft_folder))


@dataclass
class LoadedCanonicalLoRA(CanonicalLoRA):
    """Megatron-Bridge's CanonicalLoRA, with PEFT's adapter in the folder `peft_folder`."""

    peft_folder: str = ""

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Add the adapters to the chunks of a model and load them, without a collective."""
        return _load(super().__call__(model, training=training), Path(self.peft_folder))


def lora_from_peft(folder: str | Path) -> LoadedLoRA | LoadedCanonicalLoRA:
    """Make the PEFT object of Megatron-Bridge that begins with an adapter of PEFT.

    Use it as `config.peft` of a recipe, or call it with the chunks of a model. It computes what
    PEFT computes, and trains the same matrices: it is a LoRA where the projections of every fused
    linear have the same matrix A, as in Megatron-Bridge's own exports, and otherwise a
    CanonicalLoRA, in which projections without an adapter have one that stays zero.

    Args:
        folder: Has adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: A file is missing or damaged.
        UnsupportedConfig: The adapter is not a plain LoRA of one rank, or is on other modules.
    """
    folder = Path(folder)
    config, matrices = _config(folder), _matrices(folder)
    modules = sorted(name.removesuffix(_A) for name in matrices if name.endswith(_A))
    names = {module.rpartition(".")[2] for module in modules}
    if unknown := names - _CANONICAL.keys() - _LINEARS.keys():
        known = (*_CANONICAL, *_LINEARS)
        raise UnsupportedConfig(
            "target_modules", got=sorted(unknown), known=known, where=str(folder)
        )
    ranks = {matrices[module + _A].shape[0] for module in modules}
    if len(ranks) > 1:
        raise UnsupportedConfig("r", got=sorted(ranks), wanted="one rank", where=str(folder))
    (rank,) = ranks
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    fields = {
        "dim": rank,
        "alpha": scale * rank,
        "dropout": config.get("lora_dropout", 0.0),
        "peft_folder": str(folder.absolute()),
    }
    linears = [_LINEARS[name] for name in _LINEARS if name in names]
    fused = [name for name, projections in _FUSED.items() if names & set(projections)]
    if all(_is_fused(matrices, module) for module in modules):
        return LoadedLoRA(target_modules=fused + linears, **fields)
    canonical = [_CANONICAL[name] for group in fused for name in _FUSED[group]]
    return LoadedCanonicalLoRA(target_modules=canonical + linears, **fields)


def _is_fused(matrices: _Matrices, module: str) -> bool:
    """Whether all projections of a module's fused linear have its matrix A."""
    start, _, name = module.rpartition(".")
    group = next((names for names in _FUSED.values() if name in names), (name,))
    others = [matrices.get(f"{start}.{other}{_A}") for other in group]
    return all(a is not None and torch.equal(a, matrices[module + _A]) for a in others)


def _config(folder: Path) -> JSONObject:
    config = read_json(folder / "adapter_config.json")
    for field, plain in (
        ("peft_type", "LORA"),
        ("use_dora", False),
        ("bias", "none"),
        ("fan_in_fan_out", False),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("modules_to_save", None),
    ):
        if (got := config.get(field, plain)) not in (plain, None):
            raise UnsupportedConfig(
                field,
                got=got,
                wanted=f"{plain!r}",
                where=str(folder / "adapter_config.json"),
                remedy="merge the adapter in PEFT (merge_and_unload), and train a new one",
            )
    return config


def _matrices(folder: Path) -> _Matrices:
    """Read the matrices A [r, I] and B [O, r] by their names in the Hugging Face model."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(path, "this file is missing", remedy="save the adapter with PEFT")
    found = {name.removeprefix(_PREFIX): value for name, value in load_file(path).items()}
    modules = {name.removesuffix(_A).removesuffix(_B) for name in found}
    expected = {module + suffix for module in modules for suffix in (_A, _B)}
    if not found or (others := found.keys() ^ expected):
        raise UnmappedTensors(
            "tensors that are no LoRA matrices or have no partner",
            others if found else (),
            where=str(path),
            remedy="save a plain LoRA with PEFT",
        )
    return found


def _load(model: Any, folder: Path) -> Any:
    """Fill the adapters of this rank's chunks, and freeze those that PEFT does not have."""
    chunks = model if isinstance(model, list) else [model]
    description = _describe(get_model_config(chunks[0]))
    matrices = _matrices(folder)
    _check_is_of_model(description, matrices, folder)
    local = local_model(chunks)
    modules = [dict(chunk.named_modules()) for chunk in unwrap_model(chunks)]
    for param in plan_local(description, local).local_params(local.rank):
        wrapper = modules[param.chunk].get(param.name.removesuffix(".weight"))
        if (adapter := getattr(wrapper, "adapter", None)) is not None:
            _fill(adapter, param, matrices)
    return model


def _describe(provider: Any) -> ModelDescription:
    target = f"{type(provider).__module__}.{type(provider).__qualname__}"
    for family in FAMILIES:
        if family.provider_class == target:
            config = family.write_hf_config(family.model_config_of(provider), provider.hf_config)
            return family.variant_for(provider).describe(config, provider=provider)
    known = [family.provider_class.rpartition(".")[2] for family in FAMILIES]
    raise UnsupportedConfig("model", got=target, known=known, where="lora_from_peft")


def _check_is_of_model(model: ModelDescription, matrices: _Matrices, folder: Path) -> None:
    """Raise if an adapter is not that of a linear of the model, or is on an MLP with experts."""
    has_experts = any(mapping.experts for mapping in model.mappings)
    misfits = []
    for name, matrix in matrices.items():
        is_a = name.endswith(_A)
        module = name.removesuffix(_A if is_a else _B)
        shape = model.hf_shapes.get(module + ".weight", ())
        fits = len(shape) == 2 and (
            matrix.shape[1] == shape[1] if is_a else len(matrix) == shape[0]
        )
        if not fits or (has_experts and ".mlp." in name):
            misfits.append(name)
    if misfits:
        raise UnmappedTensors(
            "adapter tensors that fit no linear of the model"
            + (" (of a model with experts, attention's)" if has_experts else ""),
            misfits,
            where=str(folder),
            remedy="check that the adapter was trained on this model",
        )


def _fill(adapter: Any, param: LocalParam, matrices: _Matrices) -> None:
    """Fill the adapter of a linear on this rank: one for all its projections, or one for each."""
    mapping, shard = param.param.mapping, param.shard
    modules = [
        tensor.numbered(*param.indices).name.removesuffix(".weight") for tensor in mapping.hf
    ]
    axis_of_a = 1 if mapping.kind is MappingKind.ROW else 0
    if mapping.kind in _ADAPTERS and not hasattr(adapter, "linear_in"):
        for module, key in zip(modules, _ADAPTERS[mapping.kind], strict=True):
            _fill_one(adapter[key], axis_of_a, matrices.get(module + _A), matrices.get(module + _B))
        return
    a, b = (matrices.get(modules[0] + suffix) for suffix in (_A, _B))
    if len(modules) > 1 and b is not None:  # this rank's rows of the fused linear
        rows = torch.empty(shard.shape[0], b.shape[1], dtype=b.dtype)
        for copy in shard.copies:
            matrix = matrices[modules[copy.tensor] + _B]
            rows[slice(*copy.megatron[0])] = matrix[slice(*copy.hf[0])]
        b = rows
    _fill_one(adapter, axis_of_a, a, b)


@torch.no_grad()
def _fill_one(adapter: Any, axis_of_a: int, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    if a is None or b is None:  # B is zero, and stays so
        adapter.requires_grad_(False)
        return
    for target, matrix, axis in (
        (adapter.linear_in.weight, a, axis_of_a),
        (adapter.linear_out.weight, b, 0),
    ):
        if (num_shards := matrix.shape[axis] // target.shape[axis]) > 1:
            rank = parallel_state.get_tensor_model_parallel_rank()
            matrix = matrix.chunk(num_shards, axis)[rank]
        target.copy_(matrix)
