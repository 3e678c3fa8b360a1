"""Lets AutoBridge load our checkpoints: the tracked iteration, and those of a training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from exaone_bridge.models import is_supported
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.iterations import iteration_folder

__all__ = ["from_auto_config", "load_megatron_model"]

_REASON = (
    "It reads the iteration with the largest number, even where the tracker file names an older "
    "one, because training was rolled back or the newest was never finished."
)


# Methods of what the training loop wraps around the model.
_OF_THE_LOOP = (
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
    "grad_scale_func",
    "finalize_model_grads_func",
)


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.load_megatron_model",
    version="Megatron-Bridge 0.6.2",
    reason=f"{_REASON} The run config of a training loop's checkpoint names methods of its wrapper "
    "without their object, with which a forward pass of Megatron-Core's schedules raises.",
)
def load_megatron_model(
    original: Callable[..., Any], self: Any, path: str | Path, *args: object, **kwargs: object
) -> Any:
    """Load the tracked iteration of a supported model's checkpoint, without a loop's methods."""
    config = getattr(self.hf_pretrained, "config", self.hf_pretrained)
    if not is_supported(config):
        return original(self, path, *args, **kwargs)
    from megatron.core.utils import get_model_config

    model = original(self, _tracked(path), *args, **kwargs)
    for chunk in model if isinstance(model, list) else [model]:
        for name in _OF_THE_LOOP:
            setattr(get_model_config(chunk), name, None)
    return model


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.from_auto_config",
    version="Megatron-Bridge 0.6.2",
    reason=_REASON,
)
def from_auto_config(
    original: Callable[..., Any],
    cls: Any,
    megatron_path: str | Path,
    *args: object,
    **kwargs: object,
) -> Any:
    """Read the config of the tracked iteration, if its provider is one of exaone_bridge."""
    tracked = _tracked(megatron_path)
    run_config = tracked / "run_config.yaml"
    exact = run_config.is_file() and "exaone_bridge." in run_config.read_text()
    return original(cls, str(tracked) if exact else megatron_path, *args, **kwargs)


def _tracked(path: str | Path) -> Path:
    return iteration_folder(Path(path)) if Path(path).is_dir() else Path(path)
