"""Lets AutoBridge read the iteration of our checkpoints that the tracker file names."""

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


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.load_megatron_model",
    version="Megatron-Bridge 0.6.2",
    reason=_REASON,
)
def load_megatron_model(
    original: Callable[..., Any], self: Any, path: str | Path, *args: object, **kwargs: object
) -> Any:
    """Load the tracked iteration of a supported model's checkpoint."""
    config = getattr(self.hf_pretrained, "config", self.hf_pretrained)
    return original(self, _tracked(path) if is_supported(config) else path, *args, **kwargs)


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
