"""Which models the conversion engine can fill and read by its plan of copies, and what the engine must know of them.

AutoBridge's own calls come through here (`bridge_base.py`); what the plan does not cover goes the host's way, and the
log says which way was taken. Whether it does is found out from what all ranks share, so that all of them agree.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.utils import persistent_buffers
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge.fp8 import has_fp8_init_value
from exaone_bridge.checkpoint.reshard.load import LocalModel
from exaone_bridge.schema.parallel_layout import UNEVEN_PIPELINE_FIELDS, Layout

__all__ = ["folder_of", "place_of", "say_once", "why_not"]

logger = logging.getLogger(__name__)


def say_once(what: str, why: str | None) -> None:
    """Log on one rank which way the weights go."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        way = (
            "by the plan of copies"
            if why is None
            else f"by Megatron-Bridge's own code, because {why}"
        )
        logger.info("%s: %s", what, way)


def folder_of(hf_pretrained: Any) -> Path | None:
    """The folder of safetensors files that a pretrained wrapper reads from, if it does."""
    source = getattr(getattr(hf_pretrained, "state", None), "source", None)
    if not isinstance(source, SafeTensorsStateSource):
        return None
    path = Path(source.path)
    return path if path.is_dir() else None


def why_not(bridge: MegatronModelBridge, model: list[MegatronModule]) -> str | None:
    """Why the plan does not cover this model; None: it does."""
    if not parallel_state.is_initialized():
        return "its process groups are not Megatron-Core's global ones"
    ddp = getattr(model[0], "ddp_config", None)
    if ddp is not None and ddp.use_megatron_fsdp:
        return "its parameters are FSDP shards"
    chunks = unwrap_model(model)
    config = chunks[0].config
    if getattr(config, "fp8", None) or getattr(config, "fp4", None):
        return "its parameters may be FP8 or FP4"
    if getattr(config, "mtp_num_layers", None):
        return "it predicts several words, and its last stage has an embedding too"
    if getattr(bridge, "export_weight_dtype", "bf16") == "fp8":
        return "FP8 weights are asked for"
    if any(hasattr(chunks[0], name) for name in ("hide_teacher_model", "hide_loss_modules")):
        return "it is being distilled"
    for _, name, tensor in parameters_of(model):
        if bridge._is_adapter_param_name(name) or ".to_wrap." in name:
            return "it has adapters"
        if "_quantizer." in name:
            return "it is quantized"
        if has_fp8_init_value(tensor):
            return "its parameters remember what was rounded to FP8"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"it has parameters of the type {type(tensor).__name__}"
    return None


def parameters_of(model: list[MegatronModule]) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(chunk, name in it, tensor) of every parameter and persistent buffer here."""
    for chunk, module in enumerate(unwrap_model(model)):
        for name, tensor in itertools.chain(module.named_parameters(), persistent_buffers(module)):
            if "_extra_state" not in name:
                while name.startswith("module."):
                    name = name.removeprefix("module.")
                yield chunk, name, tensor


def place_of(model: list[MegatronModule]) -> LocalModel:
    """`LocalModel`: where this rank stands, and what it holds."""
    chunks = unwrap_model(model)
    config = chunks[0].config
    layout = Layout(
        tp=parallel_state.get_tensor_model_parallel_world_size(),
        pp=parallel_state.get_pipeline_model_parallel_world_size(),
        vpp=len(chunks),
        ep=parallel_state.get_expert_model_parallel_world_size(),
        etp=parallel_state.get_expert_tensor_parallel_world_size(),
    )
    return LocalModel(
        layout=layout,
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        layers=tuple(
            tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in chunks
        ),
        even=not any(getattr(config, name, None) for name in UNEVEN_PIPELINE_FIELDS),
        parameters={(chunk, name): tensor for chunk, name, tensor in parameters_of(model)},
    )
