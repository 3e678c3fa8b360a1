"""Saves a model as a Hugging Face folder, which gets its final name when it is complete."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge.eligibility import (
    local_model,
    log_method,
    safetensors_folder,
    why_not_planned_save,
)
from exaone_bridge.bridge.hf_source import raw_config
from exaone_bridge.checkpoint.hf.headers import TensorInfo, read_headers
from exaone_bridge.checkpoint.hf.writer import write_config_json
from exaone_bridge.checkpoint.reshard.save import (
    ShardGroup,
    raise_on_all_ranks,
    save_weights,
    write_atomically,
)
from exaone_bridge.errors import UnmappedTensors
from exaone_bridge.patches.auto_bridge_save import SaveCall
from exaone_bridge.schema.hf_config import read_dtype
from exaone_bridge.schema.hf_files import copy_companion_files, has_tokenizer
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_family import ModelDescription, ModelFamily

if TYPE_CHECKING:
    from exaone_bridge.bridge.exact_bridge import ExactBridge

__all__ = [
    "ExportSource",
    "exported_dtype",
    "passthrough_names",
    "save_hf_pretrained",
    "save_hf_weights",
    "shard_groups",
    "with_dtype",
    "write_files",
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
        source_path: the folder to take the files from; None: that of `call.hf_pretrained`.
    """

    def write(folder: Path) -> None:
        with (
            raise_on_all_ranks()
        ):  # rank 0 may fail alone: all ranks must learn of it before they gather
            if dist.get_rank() == 0:
                config = unwrap_model(call.model)[0].config
                write_files(bridge, call.hf_pretrained, folder, source_path)
                written = bridge.config_json_of(config, raw_config(call.hf_pretrained, source_path))
                dtype = exported_dtype(call.model, call.weight_dtype)
                write_config_json(folder, with_dtype(bridge.FAMILY, written, dtype))
        _write(bridge, call, folder)

    write_atomically(call.path, write)


def write_files(
    bridge: ExactBridge, hf_pretrained: Any, folder: Path, source_path: str | Path | None = None
) -> None:
    """Copy all files of a Hugging Face model but weights and config.json, byte for byte.

    Args:
        source_path: the folder to take them from; None: that of `hf_pretrained`.
    """
    source = Path(source_path or getattr(hf_pretrained, "model_name_or_path", None) or "")
    found = source if str(source) != "." and source.is_dir() else safetensors_folder(hf_pretrained)
    if found is not None:
        copy_companion_files(found, folder)
        logger.info("tokenizer and other files copied from %s", found)
    elif hasattr(hf_pretrained, "save_artifacts"):  # a model that was made in memory
        hf_pretrained.save_artifacts(folder)
    if not has_tokenizer(folder):
        logger.warning("%s has no tokenizer, because the Hugging Face source has none", folder)


def exported_dtype(
    model: list[MegatronModule], weight_dtype: torch.dtype | None = None
) -> torch.dtype:
    """Return the one dtype of an export, in its tensors and in its config.json.

    Args:
        model: this rank's chunks.
        weight_dtype: the requested dtype; None: the model's.
    """
    dtype: torch.dtype = weight_dtype or unwrap_model(model)[0].config.params_dtype
    return dtype


def with_dtype(family: ModelFamily, config: JSONMapping, dtype: torch.dtype) -> JSONObject:
    """Return config.json of the same model in another dtype.

    Raises:
        UnsupportedConfig: no supported checkpoint has this dtype.
    """
    name = read_dtype({"dtype": dtype})
    return family.write_hf_config(
        dataclasses.replace(family.read_hf_config(config), dtype=name), config
    )


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
        dtype=exported_dtype(call.model),
        dense=dense,
        expert=expert,
        files=source.files,
        passthrough=source.passthrough,
    )
