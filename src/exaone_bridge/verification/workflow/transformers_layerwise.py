"""Transformers' model layer by layer: weights are loaded before a layer runs, and freed after."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.models.auto_class import auto_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_layerwise"]


def load_layerwise(checkpoint: HFCheckpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Make Transformers' eager model with everything but the decoder layers loaded.

    The parameters of a decoder layer are on the meta device but while the layer runs.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, attn_implementation="eager", dtype=dtype)
    model.eval()
    for name, module in list(model.named_modules()):
        if any(module._buffers[each].is_meta for each in module._non_persistent_buffers_set):
            model.set_submodule(name, _with_frequencies(module, model.config))
    num_layers = checkpoint.model_config.num_layers
    layers = {
        f"{name}.{layer}"
        for name, module in model.named_modules()
        if _is_decoder(module, num_layers)
        for layer in range(num_layers)
    }
    for name, module in model.named_modules():
        if name in layers:
            _load_when_run(module, name, checkpoint, dtype)
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            _load(module, name, checkpoint, dtype, recurse=False)
    if checkpoint.model_config.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _with_frequencies(rope: torch.nn.Module, config: PretrainedConfig) -> torch.nn.Module:
    """Make a RoPE module again, off the meta device: the checkpoint does not have its frequencies.

    It takes the config that it keeps, or, as a vision encoder's up to Transformers 5.15, its width.
    """
    if "dim" in vars(rope):
        return type(rope)(rope.dim)
    return type(rope)(config=vars(rope).get("config") or config.get_text_config())


def _is_decoder(module: torch.nn.Module, num_layers: int) -> bool:
    return (
        isinstance(module, torch.nn.ModuleList)
        and len(module) == num_layers
        and hasattr(module[0], "mlp")
    )


def _load_when_run(
    layer: torch.nn.Module, name: str, checkpoint: HFCheckpoint, dtype: torch.dtype
) -> None:
    layer.register_forward_pre_hook(lambda module, _: _load(module, name, checkpoint, dtype))
    layer.register_forward_hook(lambda module, *_: module.to("meta") and None)


def _load(
    module: torch.nn.Module,
    prefix: str,
    checkpoint: HFCheckpoint,
    dtype: torch.dtype,
    recurse: bool = True,
) -> None:
    """Replace parameters and buffers on the meta device by those of the checkpoint."""
    parameters = list(module.named_parameters(recurse=recurse))
    for name, current in [*parameters, *module.named_buffers(recurse=recurse)]:
        full = f"{prefix}.{name}" if prefix else name
        if not current.is_meta or (value := _read(full, checkpoint)) is None:
            continue
        owner, _, leaf = name.rpartition(".")
        value = value.to(torch.float32 if current.dtype == torch.float32 else dtype)
        if isinstance(current, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        setattr(module.get_submodule(owner), leaf, value)


def _read(name: str, checkpoint: HFCheckpoint) -> torch.Tensor | None:
    """Read the tensor of a parameter, and fuse experts as Transformers does in memory.

    Returns:
        The tensor, or None if the parameter is tied to another.
    """
    if name in checkpoint.tensors:
        return checkpoint.read(name)
    if (renamed := _checkpoint_name(name, checkpoint)) is not None:
        return checkpoint.read(renamed)
    module, _, leaf = name.rpartition(".")
    projections = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(leaf)
    if projections is None or not module.endswith(".experts"):
        return None
    pattern = re.compile(rf"{re.escape(module)}\.\d+\.down_proj\.weight")
    experts = sum(1 for each in checkpoint.tensors if pattern.fullmatch(each))
    return torch.stack(
        [
            torch.cat(
                [checkpoint.read(f"{module}.{expert}.{each}_proj.weight") for each in projections]
            )
            for expert in range(experts)
        ]
    )


def _checkpoint_name(name: str, checkpoint: HFCheckpoint) -> str | None:
    """Find the tensor of a parameter that Transformers has in another module than the checkpoint.

    It is in the same layer, and the last two parts of its name are the same, or at least the last.
    """
    match = re.match(r".*?\.\d+\.", name)
    if match is None:
        return None
    in_layer = [each for each in checkpoint.tensors if each.startswith(match[0])]
    for parts in (2, 1):
        last = name.split(".")[-parts:]
        found = [each for each in in_layer if each.split(".")[-parts:] == last]
        if found:
            return found[0] if len(found) == 1 else None
    return None
