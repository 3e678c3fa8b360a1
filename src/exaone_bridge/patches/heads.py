"""Lets AutoBridge take models with a head (sequence and token classification, answers)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exaone_bridge.models import is_supported
from exaone_bridge.models.auto_class import auto_class
from exaone_bridge.models.exaone4.head_config import HEADS
from exaone_bridge.patches.patch import patch, patch_value

__all__ = ["resolve_pretrained_wrapper_cls", "save_hf_adapter", "supported_hf_architectures"]

_AUTO_BRIDGE = "megatron.bridge.models.conversion.auto_bridge"


@patch_value(
    f"{_AUTO_BRIDGE}:SUPPORTED_HF_ARCHITECTURES",
    version="Megatron-Bridge 0.6.2",
    reason="AutoBridge takes architectures whose names end in ForCausalLM or "
    "ForConditionalGeneration, and none with a head, whichever bridges are registered.",
)
def supported_hf_architectures(endings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the endings of architectures that AutoBridge takes, with our models with a head."""
    return (*endings, *(name for name in HEADS if name not in endings))


@patch(
    f"{_AUTO_BRIDGE}:_resolve_pretrained_wrapper_cls",
    version="Megatron-Bridge 0.6.2",
    reason="The model of the wrapper, which is loaded when it is asked for, is a language model: "
    "of a checkpoint with a head it would have an output layer of random weights.",
)
def resolve_pretrained_wrapper_cls(original: Callable[..., Any], config: Any) -> Any:
    """Return the wrapper's class; of a supported model with a head one that loads the head."""
    wrapper: Any = original(config)
    if not _has_head(config):
        return wrapper

    class PreTrainedWithHead(wrapper):
        """Loads Transformers' model with its head."""

        def _load_model(self) -> Any:
            arguments = {**self.init_kwargs, "config": self.config, "trust_remote_code": False}
            if self.torch_dtype is not None:
                arguments["dtype"] = self.torch_dtype
            found = auto_class(self.config).from_pretrained(self.model_name_or_path, **arguments)
            return found.to(self.device)

    return PreTrainedWithHead


@patch(
    f"{_AUTO_BRIDGE}:AutoBridge.save_hf_adapter",
    version="Megatron-Bridge 0.6.2",
    reason="The task of every adapter is CAUSAL_LM, with which PEFT asks the model for methods of "
    "text generation that a model with a head does not have; and a head that was trained with the "
    "adapter is left out.",
)
def save_hf_adapter(
    original: Callable[..., None],
    self: Any,
    model: list[Any],
    path: str | Path,
    *args: object,
    **kwargs: object,
) -> None:
    """Save an adapter for PEFT; with a head, without a task, and with the head if it was trained.

    With the task of a head, PEFT would want the head's weights in every adapter.
    """
    import torch.distributed as dist  # imported late: this module is imported without torch

    original(self, model, path, *args, **kwargs)
    if not _has_head(getattr(self.hf_pretrained, "config", self.hf_pretrained)):
        return
    head = _trained_head(model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        from safetensors.torch import load_file, save_file

        file = Path(path) / "adapter_config.json"
        config = json.loads(file.read_text()) | {"task_type": None}
        if head:
            config["modules_to_save"] = sorted({name.partition(".")[0] for name in head})
            weights = Path(path) / "adapter_model.safetensors"
            found = {f"base_model.model.{name}": tensor for name, tensor in head.items()}
            save_file(load_file(weights) | found, weights)
        file.write_text(json.dumps(config, indent=2))
    if dist.is_initialized():
        dist.barrier()


def _trained_head(model: list[Any]) -> dict[str, Any]:
    """Return the head's weight [L, H] and bias [L] on rank 0, if they are trained.

    Args:
        model: this rank's chunks; the last pipeline stage has the head.
    """
    import torch.distributed as dist
    from megatron.core.utils import unwrap_model

    head = {
        f"{chunk.head.hf_name}.{name}": parameter.detach().cpu()
        for chunk in unwrap_model(model if isinstance(model, list) else [model])
        if chunk.post_process
        for name, parameter in chunk.output_layer.named_parameters()
        if parameter.requires_grad
    }
    if dist.is_initialized():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, head)
        head = next(filter(None, everywhere), {})
    return head


def _has_head(config: Any) -> bool:
    return is_supported(config) and bool(HEADS.keys() & set(config.architectures))
