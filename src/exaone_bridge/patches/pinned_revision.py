"""Loads config and weights of one revision, and a requested dtype for every part of the config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exaone_bridge.models import is_supported
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.hf_snapshot import snapshot_folder

__all__ = ["from_hf_pretrained"]

_DTYPE = {"dtype", "torch_dtype"}
_DOWNLOAD = ("cache_dir", "token", "local_files_only")  # arguments of both libraries


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.from_hf_pretrained",
    version="Megatron-Bridge 0.6.2",
    reason="With revision=, config and tokenizer come from that revision and weights from `main`: "
    "SafeTensorsStateSource knows no revision. With torch_dtype=, only the outer config of EXAONE "
    '4.5 gets that dtype, and with "auto" the config has no dtype.',
)
def from_hf_pretrained(
    original: Callable[..., Any], cls: Any, path: str | Path, *args: object, **kwargs: Any
) -> Any:
    """Load a model; a supported one of the Hub reads the snapshot that its config came from."""
    bridge = original(cls, path, *args, **kwargs)
    config = bridge.hf_pretrained.config
    if is_supported(config) and (requested := _DTYPE & kwargs.keys()):
        if config.dtype == "auto":  # that of config.json
            others = {name: value for name, value in kwargs.items() if name not in requested}
            bridge = original(cls, path, *args, **others)
            config = bridge.hf_pretrained.config
        else:
            for name in config.sub_configs:
                getattr(config, name).dtype = config.dtype
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
