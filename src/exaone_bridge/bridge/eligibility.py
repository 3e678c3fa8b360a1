"""Whether the reshard plan loads and saves a model, or Megatron-Bridge's own code does, and why.

The reasons are found from what all ranks know, so that all ranks decide alike. The log tells the
decision.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.utils import persistent_buffers
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateSource
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge.fp8 import has_fp8_init_value
from exaone_bridge.checkpoint.reshard.load import LocalModel
from exaone_bridge.checkpoint.reshard.plan import Rank
from exaone_bridge.schema.parallel_layout import UNEVEN_PIPELINE_FIELDS, Layout

__all__ = [
    "local_model",
    "log_method",
    "log_notes",
    "named_tensors",
    "safetensors_folder",
    "source_of",
    "why_not_planned",
    "why_not_planned_load",
    "why_not_planned_save",
]

logger = logging.getLogger(__name__)


def log_method(direction: str, why_not: str | None) -> None:
    """Log on rank 0 how the weights are converted, and why not by the reshard plan."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        method = (
            "by the reshard plan"
            if why_not is None
            else f"by Megatron-Bridge's own code, because {why_not}"
        )
        logger.info("%s: %s", direction, method)


def log_notes(notes: Iterable[str]) -> None:
    """Log on rank 0 what was accepted of a folder although its config says otherwise."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for note in notes:
            logger.warning("%s", note)


def source_of(hf_pretrained: Any) -> StateSource | None:
    """Return the tensors that Megatron-Bridge's wrapper of a Transformers model reads, if any."""
    source: StateSource | None = getattr(getattr(hf_pretrained, "state", None), "source", None)
    return source


def safetensors_folder(hf_pretrained: Any) -> Path | None:
    """Return the folder of safetensors files that the wrapper reads from, if it does."""
    source = source_of(hf_pretrained)
    if not isinstance(source, SafeTensorsStateSource):
        return None
    path = Path(source.path)
    return path if path.is_dir() else None


def why_not_planned_load(
    bridge: MegatronModelBridge,
    model: list[MegatronModule],
    hf_pretrained: Any,
    allowed_mismatched_params: list[str] | None,
) -> str | None:
    """Return why the reshard plan cannot load this model; None: it can. No collective."""
    if (why := why_not_planned(bridge, model)) is not None:
        return why
    if safetensors_folder(hf_pretrained) is None:
        return "the source is not a folder of safetensors files"
    if allowed_mismatched_params:
        return "parameters of other shapes are allowed"
    hook = type(bridge).maybe_modify_loaded_hf_weight
    if hook is not MegatronModelBridge.maybe_modify_loaded_hf_weight:
        return "the bridge changes weights as it reads them"
    return None


def why_not_planned_save(
    bridge: MegatronModelBridge, model: list[MegatronModule], weight_dtype: torch.dtype | None
) -> str | None:
    """Return why the reshard plan cannot save this model; None: it can.

    A collective: every rank returns the reason of the first rank that has one.
    """
    if weight_dtype is not None:
        why: str | None = "another dtype of weights is requested"
    else:
        why = why_not_planned(bridge, model)
        if why is None and not local_model(model).even_pipeline:
            why = "its pipeline stages are uneven"
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    return next((reason for reason in reasons if reason is not None), None)


def why_not_planned(bridge: MegatronModelBridge, model: list[MegatronModule]) -> str | None:
    """Return why the reshard plan can neither load nor save this model; None: it can both."""
    if not parallel_state.is_initialized():
        return "its process groups are not Megatron-Core's global ones"
    ddp = getattr(model[0], "ddp_config", None)
    if ddp is not None and ddp.use_megatron_fsdp:
        return "its parameters are FSDP shards"
    chunks = unwrap_model(model)
    config = chunks[0].config
    if getattr(config, "fp8_param", None) or getattr(config, "fp4_param", None):
        return "its parameters may be FP8 or FP4"
    if getattr(config, "mtp_num_layers", None):
        return "it has multi-token prediction, whose last stage has an embedding too"
    if getattr(bridge, "export_weight_dtype", "bf16") == "fp8":
        return "FP8 weights are requested"
    if any(hasattr(chunks[0], name) for name in ("hide_teacher_model", "hide_loss_modules")):
        return "it is being distilled"
    for _, name, tensor in named_tensors(model):
        if bridge._is_adapter_param_name(name) or ".to_wrap." in name:
            return "it has adapters"
        if "_quantizer." in name:
            return "it is quantized"
        if has_fp8_init_value(tensor):
            return "its FP8 parameters keep their initial values"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"it has parameters of the type {type(tensor).__name__}"
    return None


def named_tensors(model: list[MegatronModule]) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Yield (chunk, name in it, tensor [...]) of this rank's parameters and persistent buffers."""
    for chunk, module in enumerate(unwrap_model(model)):
        for name, tensor in itertools.chain(module.named_parameters(), persistent_buffers(module)):
            if "_extra_state" not in name:
                while name.startswith("module."):
                    name = name.removeprefix("module.")
                yield chunk, name, tensor


def local_model(model: list[MegatronModule]) -> LocalModel:
    """Describe this rank's part of a model: its ranks, layers and tensors."""
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
        rank=Rank(
            pp=parallel_state.get_pipeline_model_parallel_rank(),
            tp=parallel_state.get_tensor_model_parallel_rank(),
            ep=parallel_state.get_expert_model_parallel_rank(),
            etp=parallel_state.get_expert_tensor_parallel_rank(),
        ),
        layers=tuple(
            tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in chunks
        ),
        even_pipeline=not any(getattr(config, name, None) for name in UNEVEN_PIPELINE_FIELDS),
        parameters={(chunk, name): tensor for chunk, name, tensor in named_tensors(model)},
    )
