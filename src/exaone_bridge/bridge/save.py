"""Saves a model as a Hugging Face folder, which gets its final name when it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge import eligibility
from exaone_bridge.checkpoint.reshard.save import Group, into, save, together
from exaone_bridge.patches.auto_bridge_save import SaveCall
from exaone_bridge.schema.model_family import ModelDescription

if TYPE_CHECKING:
    from exaone_bridge.bridge.exact_bridge import ExactBridge

__all__ = ["save_hf_pretrained", "save_hf_weights", "shard_groups"]


def save_hf_weights(bridge: ExactBridge, call: SaveCall) -> None:
    """Write the weights into a folder, which may exist and then keeps its other files."""
    into(call.path, lambda folder: _write(bridge, call, folder))


def save_hf_pretrained(bridge: ExactBridge, call: SaveCall, source_path: str | Path | None) -> None:
    """Write config, tokenizer, further files and weights into a new folder.

    Args:
        source_path: the folder of custom modeling files; None: that of `call.hf_pretrained`.
    """

    def write(folder: Path) -> None:
        with together():  # rank 0 may fail alone: all ranks must learn of it before they gather
            if dist.get_rank() == 0:
                call.hf_pretrained.save_artifacts(
                    folder,
                    original_source_path=source_path,
                    additional_files=bridge.ADDITIONAL_FILE_PATTERNS,
                )
        _write(bridge, call, folder)

    into(call.path, write)


def _write(bridge: ExactBridge, call: SaveCall, folder: Path) -> None:
    why = _everyones(_why_not(bridge, call))
    eligibility.say_once("Megatron-Core -> Hugging Face", why)
    if why is None:
        _save(bridge, call, folder)
    else:
        call.save_weights(folder)


def _why_not(bridge: ExactBridge, call: SaveCall) -> str | None:
    if call.weight_dtype is not None:
        return "another type of weights is asked for"
    if (why := eligibility.why_not(bridge, call.model)) is not None:
        return why
    return None if eligibility.place_of(call.model).even else "its pipeline is cut unevenly"


def _everyones(why: str | None) -> str | None:
    """The first rank's reason that has one: all ranks go the same way."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    return next((reason for reason in reasons if reason is not None), None)


def shard_groups() -> tuple[Group, Group]:
    """Return the groups over which dense and expert parameters are sharded and replicated."""
    dense = Group(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    )
    expert = Group(
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_rank(),
        parallel_state.get_expert_data_parallel_world_size(),
    )
    return dense, expert


def _save(bridge: ExactBridge, call: SaveCall, folder: Path) -> None:
    dense, expert = shard_groups()
    model_config, mappings, files, passthrough = bridge.to_be_saved(call.hf_pretrained)
    save(
        folder,
        ModelDescription(bridge.FAMILY, model_config, mappings),
        eligibility.place_of(call.model),
        dtype=unwrap_model(call.model)[0].config.params_dtype,
        dense=dense,
        expert=expert,
        files=files,
        passthrough=passthrough,
    )
