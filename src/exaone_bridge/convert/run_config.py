"""Writes the files beside the weights of a Megatron-Bridge checkpoint: run config and train state.

They are those of `megatron.bridge.training.model_load_save.save_megatron_model` (0.6.2), made
without a model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.runtime.cpu import cpu_runtime
from exaone_bridge.schema.parallel_layout import Layout

__all__ = ["layers_are_stacked", "provider_for", "write_beside"]


def provider_for(hf_folder: Path, layout: Layout, backend: str) -> Any:
    """Make the finalized provider of a Hugging Face folder's model; no weights are read.

    Raises:
        BridgeError: `finalize` rejects the config, the layout or the backend.
    """
    from megatron.bridge import AutoBridge

    with cpu_runtime():
        provider = AutoBridge.from_hf_pretrained(hf_folder).to_megatron_provider(load_weights=False)
        dtype = provider.params_dtype
        fields = layout.provider_overrides() | {
            "backend": backend,
            "pipeline_dtype": dtype,
            "autocast_dtype": dtype,
        }
        provider.apply_overrides_and_finalize(dtype, fields)
    return provider


def layers_are_stacked(provider: Any) -> bool:
    """Return whether Megatron-Core stores all layers of a parameter as one tensor.

    The conditions are those of `TransformerBlock.sharded_state_dict` (0.19.2).
    """
    frequencies = (provider.moe_layer_freq, provider.linear_attention_freq)
    uneven = any(isinstance(frequency, list) or (frequency or 0) > 1 for frequency in frequencies)
    return not (
        uneven or provider.heterogeneous_block_specs or provider.hetereogenous_dist_checkpoint
    )


def write_beside(folder: Path, provider: Any, target: Path) -> Path:
    """Write everything but the weights into a checkpoint's folder.

    Args:
        folder: The folder, which is empty.
        provider: The provider of the model.
        target: Where the folder will be in the end.

    Returns:
        The folder of iteration 0, for the weights.
    """
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
    from megatron.bridge.training.state import TrainState
    from megatron.bridge.training.utils.checkpoint_utils import (
        get_checkpoint_name,
        get_checkpoint_run_config_filename,
        get_checkpoint_tracker_filename,
        get_checkpoint_train_state_filename,
    )
    from megatron.core.optimizer import OptimizerConfig

    iteration = Path(get_checkpoint_name(str(folder), 0))
    iteration.mkdir(parents=True)
    checkpoint = CheckpointConfig(
        async_save=False,
        save=str(target),
        save_optim=False,
        save_rng=False,
        ckpt_format="torch_dist",
        dist_ckpt_optim_fully_reshardable=True,
    )
    container = ConfigContainer(
        model=provider,
        train=None,
        optimizer=OptimizerConfig(use_distributed_optimizer=False),
        ddp=None,
        scheduler=None,
        dataset=None,
        logger=LoggerConfig(),
        tokenizer=None,
        checkpoint=checkpoint,
        dist=None,
    )
    container.to_yaml(get_checkpoint_run_config_filename(str(iteration)))
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    torch.save(TrainState().state_dict(), get_checkpoint_train_state_filename(str(iteration)))
    latest = get_checkpoint_train_state_filename(str(folder), prefix="latest")
    shutil.copyfile(get_checkpoint_train_state_filename(str(iteration)), latest)
    Path(get_checkpoint_tracker_filename(str(folder))).write_text("0")
    return iteration
