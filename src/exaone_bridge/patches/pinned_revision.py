"""Takes weights from the same snapshot of the Hugging Face Hub as the config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exaone_bridge.models import is_supported
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.hf_snapshot import snapshot_folder

__all__ = ["from_hf_pretrained"]

_DOWNLOAD = ("cache_dir", "token", "local_files_only")  # arguments of both libraries


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.from_hf_pretrained",
    version="Megatron-Bridge 0.6.2",
    reason="With revision=, config and tokenizer come from that revision and weights from `main`: "
    "SafeTensorsStateSource knows no revision.",
)
def from_hf_pretrained(
    original: Callable[..., Any], cls: Any, path: str | Path, *args: object, **kwargs: Any
) -> Any:
    """Load a model; a supported one of the Hub reads the snapshot that its config came from."""
    bridge = original(cls, path, *args, **kwargs)
    config = bridge.hf_pretrained.config
    if is_supported(config) and not Path(path).is_dir():
        # `main` may move between two downloads: the commit of the config counts.
        revision = getattr(config, "_commit_hash", None) or kwargs.get("revision")
        download = {name: kwargs[name] for name in _DOWNLOAD if name in kwargs}
        bridge.hf_pretrained._state_dict_accessor = _pinned_state(path, revision, download)
    return bridge


def _pinned_state(path: str | Path, revision: str | None, download: dict[str, Any]) -> Any:
    from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource, StateDict

    resolve = functools.cache(lambda: snapshot_folder(path, revision, **download))

    class PinnedSource(SafeTensorsStateSource):
        """Reads the safetensors files of one revision, downloaded when they are first needed."""

        @property
        def path(self) -> Path:
            """The folder of the snapshot."""
            return resolve()

    return StateDict(PinnedSource(path))
