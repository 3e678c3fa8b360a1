"""Saves a model as a Hugging Face folder, which gets its final name when it is complete."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge.eligibility import (
    local_model,
    log_method,
    safetensors_folder,
    why_not_planned_save,
)
from exaone_bridge.checkpoint.hf.headers import TensorInfo, read_headers
from exaone_bridge.checkpoint.reshard.save import (
    ShardGroup,
    raise_on_all_ranks,
    save_weights,
    write_atomically,
)
from exaone_bridge.errors import UnmappedTensors
from exaone_bridge.patches.auto_bridge_save import SaveCall
from exaone_bridge.schema.model_family import ModelDescription

if TYPE_CHECKING:
    from exaone_bridge.bridge.exact_bridge import ExactBridge

__all__ = [
    "ExportSource",
    "passthrough_names",
    "save_hf_pretrained",
    "save_hf_weights",
    "shard_groups",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What a planned export needs of the Hugging Face model that the weights came from.

    Attributes:
        model: its description.
        files: tensor -> name of its file; None without a folder of safetensors files.
        passthrough: the passthrough tensors, which are copied.
    """

    model: ModelDescription
    files: Mapping[str, str] | None = None
    passthrough: Mapping[str, TensorInfo] = field(default_factory=dict)


def save_hf_weights(bridge: ExactBridge, call: SaveCall) -> None:
    """Write the weights into a folder, which may exist and then keeps its other files."""
    write_atomically(call.path, lambda folder: _write(bridge, call, folder))


def save_hf_pretrained(bridge: ExactBridge, call: SaveCall, source_path: str | Path | None) -> None:
    """Write config, tokenizer, further files and weights into a folder, which may exist.

    Args:
        source_path: the folder of custom modeling files; None: that of `call.hf_pretrained`.
    """

    def write(folder: Path) -> None:
        with (
            raise_on_all_ranks()
        ):  # rank 0 may fail alone: all ranks must learn of it before they gather
            if dist.get_rank() == 0:
                call.hf_pretrained.save_artifacts(
                    folder,
                    original_source_path=source_path,
                    additional_files=bridge.ADDITIONAL_FILE_PATTERNS,
                )
        _write(bridge, call, folder)

    write_atomically(call.path, write)


def passthrough_names(
    model: ModelDescription, names: Iterable[str], *, has_source: bool
) -> list[str]:
    """Find the passthrough tensors among the names of the source's tensors, sorted.

    Raises:
        UnmappedTensors: there is no source, and the config says that passthrough tensors exist.
    """
    if not has_source and (expected := [tensor.name for tensor in model.passthrough_tensors]):
        raise UnmappedTensors(
            "passthrough tensors are missing, because there is no Hugging Face source",
            expected,
            where="export",
            remedy="export with the Hugging Face source at hand, or from a configuration without "
            "them (num_nextn_predict_layers 0)",
        )
    found = sorted(name for name in names if model.is_passthrough(name))
    if found and (not dist.is_initialized() or dist.get_rank() == 0):
        logger.info(
            "passthrough tensors copied from the source: %d (%s, ...)", len(found), found[0]
        )
    return found


def _write(bridge: ExactBridge, call: SaveCall, folder: Path) -> None:
    why = why_not_planned_save(bridge, call.model, call.weight_dtype)
    log_method("Megatron-Core -> Hugging Face", why)
    if why is None:
        _save(bridge, call, folder)
    else:
        call.save_weights(folder)


def _export_source(bridge: ExactBridge, call: SaveCall) -> ExportSource:
    model = bridge.describe(call.hf_pretrained, call.model)
    folder = safetensors_folder(call.hf_pretrained)
    tensors = {
        name: info
        for name, info in ({} if folder is None else read_headers(folder)).items()
        if not model.is_redundant(name)
    }
    names = passthrough_names(model, tensors, has_source=folder is not None)
    files = {name: info.file.name for name, info in tensors.items()}
    return ExportSource(
        model, None if folder is None else files, {name: tensors[name] for name in names}
    )


def shard_groups() -> tuple[ShardGroup, ShardGroup]:
    """Return the groups over which dense and expert parameters are sharded and replicated."""
    dense = ShardGroup(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    expert = ShardGroup(
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_rank(),
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return dense, expert


def _save(bridge: ExactBridge, call: SaveCall, folder: Path) -> None:
    source = _export_source(bridge, call)
    dense, expert = shard_groups()
    save_weights(
        folder,
        source.model,
        local_model(call.model),
        dtype=unwrap_model(call.model)[0].config.params_dtype,
        dense=dense,
        expert=expert,
        files=source.files,
        passthrough=source.passthrough,
    )
