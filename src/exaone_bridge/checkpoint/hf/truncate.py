"""Makes a small model of a real one: its first layers, with their weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import TensorSpec
from exaone_bridge.checkpoint.hf.writer import write_model
from exaone_bridge.checkpoint.staging import staged
from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_files import copy_companion_files
from exaone_bridge.schema.model_config import ModelConfig

__all__ = ["write_first_layers"]


def write_first_layers(source: HFCheckpoint, layers: int, target: Path) -> ModelConfig:
    """Write a model with the first layers of another one, its embeddings, and all other parts.

    Passthrough tensors are not written. The tokenizer and all other files are copied.

    Args:
        source: The model.
        layers: How many layers are kept.
        target: The output folder, which must not exist.

    Returns:
        The config of the model that was written.

    Raises:
        UnsupportedConfig: The model has fewer layers, or none of those kept has experts.
        CheckpointError: The target exists.
    """
    family = source.model.family
    small = _first_layers(family.without_passthrough(source.model.config), layers)
    config = family.write_hf_config(small, source.config)
    model = family.describe(config)
    specs = [
        TensorSpec(name, source.tensors[name].dtype, source.tensors[name].shape)
        for name in model.hf_shapes
    ]
    with staged(target) as folder:
        tensors = ((spec.name, source.read(spec.name)) for spec in specs)
        write_model(folder, config, specs, tensors)
        copy_companion_files(source.folder, folder)
    return small


def _first_layers(model_config: ModelConfig, layers: int) -> ModelConfig:
    before, moe = model_config.num_layers, model_config.moe
    if not 1 <= layers <= before:
        wanted = f"from 1 to the model's {before} layers"
        raise UnsupportedConfig("--layers", got=layers, wanted=wanted, where="command line")
    if moe is not None and not any(moe.layer_mask[:layers]):
        wanted = f"at least {moe.layer_mask.index(True) + 1}, the first layer with experts"
        raise UnsupportedConfig("--layers", got=layers, wanted=wanted, where="command line")
    changes: dict[str, Any] = {"num_layers": layers, **_shortened(model_config, before, layers)}
    if moe is not None:
        changes["moe"] = dataclasses.replace(moe, **_shortened(moe, before, layers))
    return dataclasses.replace(model_config, **changes)


def _shortened(part: Any, before: int, layers: int) -> dict[str, Any]:
    """Return the fields with one value for each layer, with those of the first layers."""
    values = {each.name: getattr(part, each.name) for each in dataclasses.fields(part)}
    return {
        name: value[:layers]
        for name, value in values.items()
        if isinstance(value, tuple) and len(value) == before
    }
