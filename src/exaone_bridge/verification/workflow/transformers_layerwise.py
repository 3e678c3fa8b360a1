"""Transformers' side a layer at a time: its own whole model, whose weights come and go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.verification.workflow.transformers import model_class

__all__ = ["Reader", "layerwise_transformers"]


class Reader(Mapping[str, torch.Tensor]):
    """The tensors of a folder, each read when it is asked for."""

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.tensors)


def layerwise_transformers(source: HFCheckpoint, dtype: torch.dtype) -> Any:
    """Transformers' eager model whose layers are filled when they run; what is outside them stays."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder)
    with torch.device("meta"):
        model = (
            model_class(source.folder)
            .from_config(config, attn_implementation="eager", dtype=dtype)
            .eval()
        )
    reader = Reader(source)
    for name, module in list(model.named_modules()):
        if any(
            buffer.is_meta for buffer in module.buffers(recurse=False)
        ):  # RoPE's frequencies: no weights
            model.set_submodule(name, _anew(module, model.config))
    stacks = [
        name for name, module in model.named_modules() if _are_layers(module, source.model_config)
    ]
    layers = {
        f"{name}.{number}" for name in stacks for number in range(source.model_config.num_layers)
    }
    for name, module in model.named_modules():
        if name in layers:
            _fill_when_run(module, name, reader, dtype)
        elif not any(name.startswith(f"{layer}.") for layer in layers):
            _fill(module, name, reader, dtype, recurse=False)
    if source.model_config.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def _anew(rope: Any, config: Any) -> torch.nn.Module:
    """The same module of RoPE with its frequencies: a language model's takes a configuration, a tower's its width."""
    is_vision = "dim" in vars(rope)
    return type(rope)(rope.dim) if is_vision else type(rope)(config=config.get_text_config())


def _are_layers(module: torch.nn.Module, model_config: Any) -> bool:
    return (
        isinstance(module, torch.nn.ModuleList)
        and len(module) == model_config.num_layers
        and hasattr(module[0], "mlp")
    )


def _fill_when_run(layer: torch.nn.Module, name: str, reader: Reader, dtype: torch.dtype) -> None:
    layer.register_forward_pre_hook(lambda module, _: _fill(module, name, reader, dtype))
    layer.register_forward_hook(lambda module, *_: module.to("meta") and None)


def _fill(
    module: torch.nn.Module, prefix: str, reader: Reader, dtype: torch.dtype, recurse: bool = True
) -> None:
    """Put the weights on disk in the places of parameters on "meta"."""
    for name, parameter in list(module.named_parameters(recurse=recurse)):
        full = f"{prefix}.{name}" if prefix else name
        if parameter.is_meta and (value := _read(full, reader)) is not None:
            owner, _, leaf = name.rpartition(".")
            keep = parameter.dtype if parameter.dtype == torch.float32 else dtype
            setattr(
                module.get_submodule(owner),
                leaf,
                torch.nn.Parameter(value.to(keep), requires_grad=False),
            )


def _read(name: str, reader: Reader) -> torch.Tensor | None:
    """The tensor of this parameter; Transformers stacks experts in memory. None: tied to another."""
    if name in reader:
        return reader[name]
    if (renamed := _renamed(name, reader)) is not None:
        return reader[renamed]
    module, _, leaf = name.rpartition(".")
    which = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(leaf)
    if which is None or not module.endswith(".experts"):
        return None
    count = sum(
        1 for each in reader if re.fullmatch(rf"{re.escape(module)}\.\d+\.down_proj\.weight", each)
    )
    experts = [
        torch.cat([reader[f"{module}.{expert}.{one}_proj.weight"] for one in which])
        for expert in range(count)
    ]
    return torch.stack(experts)


def _renamed(name: str, reader: Reader) -> str | None:
    """Transformers holds some tensors in another module than on disk: the same layer, and the same last two words."""
    layer, tail = re.match(r".*?\.\d+\.|", name)[0], name.split(".")[-2:]  # type: ignore[index]
    found = [each for each in reader if each.startswith(layer) and each.split(".")[-2:] == tail]
    return found[0] if layer and len(found) == 1 else None
