"""Dispatches AutoBridge's saving calls to model bridges that implement `SavesHuggingFace`."""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exaone_bridge.models import is_supported
from exaone_bridge.patches.patch import patch
from exaone_bridge.schema.json_types import JSONObject

__all__ = [
    "SaveCall",
    "SavesHuggingFace",
    "export_hf_weights",
    "mtp_source_key_prefixes",
    "save_hf_pretrained",
    "save_hf_weights",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCall:
    """One call of `AutoBridge.save_hf_weights` or `save_hf_pretrained`, made by every rank.

    Attributes:
        hf_pretrained: AutoBridge's Transformers model or config.
        model: this rank's model chunks.
        path: the folder to write.
        weight_dtype: the dtype to cast weights to; None: they keep theirs.
        save_weights: Megatron-Bridge's own `save_hf_weights` of this model, into the given folder.
    """

    hf_pretrained: Any
    model: list[Any]
    path: Path
    weight_dtype: torch.dtype | None
    save_weights: Callable[[Path], None]


class SavesHuggingFace(ABC):
    """A model bridge with its own implementation of AutoBridge's saving calls."""

    @abstractmethod
    def needs_source(self, hf_config: Any) -> bool:
        """Return whether an export copies passthrough tensors, which only the source has."""

    @abstractmethod
    def save_hf_weights(self, call: SaveCall) -> None:
        """Write the weights into `call.path`, which may exist."""

    @abstractmethod
    def save_hf_pretrained(self, call: SaveCall, source_path: str | Path | None) -> None:
        """Write config, tokenizer, other files and weights into `call.path`, which may exist.

        Args:
            source_path: the folder to take the files from; None: that of `call.hf_pretrained`.
        """


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.save_hf_weights",
    version="Megatron-Bridge 0.6.2",
    reason="It gathers every tensor on every rank, and writes files under their final names, so "
    "that an interrupted export looks complete.",
)
def save_hf_weights(
    original: Callable[..., None],
    self: Any,
    model: Any,
    path: str | Path,
    *args: object,
    **kwargs: object,
) -> None:
    """Save a model's weights through its model bridge."""
    self = _with_source(self)
    model_bridge = _saving_bridge(self)
    if model_bridge is None:
        original(self, model, path, *args, **kwargs)
        return
    options = _options(original, self, model, path, *args, **kwargs)
    model_bridge.save_hf_weights(_call(original, self, model, path, options))


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.save_hf_pretrained",
    version="Megatron-Bridge 0.6.2",
    reason="It writes config and tokenizer files on rank 0 under their final names before the "
    "weights; where that fails, the other ranks wait for rank 0 in the gathering of weights.",
)
def save_hf_pretrained(
    original: Callable[..., None],
    self: Any,
    model: Any,
    path: str | Path,
    *args: object,
    **kwargs: object,
) -> None:
    """Save a model through its model bridge."""
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    options = _options(original, self, model, path, *args, **kwargs)
    self = _with_source(self, options.get("source_path"))
    model_bridge = _saving_bridge(self)
    if model_bridge is None:
        original(self, model, path, *args, **kwargs)
        return
    # `from_auto_config` knows the Hugging Face model only by its name.
    source_path = options.pop("source_path") or getattr(self, "hf_model_id", None)
    own_save = AutoBridge.save_hf_weights.__wrapped__  # Megatron-Bridge's
    model_bridge.save_hf_pretrained(_call(own_save, self, model, path, options), source_path)


@patch(
    "megatron.bridge.models.conversion.auto_bridge:AutoBridge.export_hf_weights",
    version="Megatron-Bridge 0.6.2",
    reason="With AutoBridge.from_auto_config, it does not read the passthrough tensors of the "
    "source.",
)
def export_hf_weights(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Yield a model's weights, and the passthrough tensors of its source."""
    return original(_with_source(self), *args, **kwargs)


def _with_source(auto_bridge: Any, source_path: str | Path | None = None) -> Any:
    """Give an AutoBridge that has a config only the tensors of its source, if it needs them.

    `AutoBridge.from_auto_config` makes such a one. Its `hf_model_id` is the source, or
    `source_path`, as in AutoBridge's own `save_hf_pretrained`.
    """
    from transformers import PretrainedConfig

    config, source = auto_bridge.hf_pretrained, auto_bridge.hf_model_id or source_path
    if source is None or not isinstance(config, PretrainedConfig) or not is_supported(config):
        return auto_bridge
    model_bridge = auto_bridge._model_bridge
    if not isinstance(model_bridge, SavesHuggingFace) or not model_bridge.needs_source(config):
        return auto_bridge
    with_source = copy.copy(auto_bridge)
    with_source.hf_pretrained = auto_bridge._pretrained_wrapper_cls.from_pretrained(
        source, trust_remote_code=auto_bridge.trust_remote_code
    )
    with_source.hf_pretrained.config = config
    return with_source


@patch(
    "megatron.bridge.models.conversion.auto_bridge:_mtp_source_key_prefixes",
    version="Megatron-Bridge 0.6.2",
    reason="It takes the tensors of multi-token prediction out of what an export expects where the "
    "model does not build it; our bridges export them all the same, as passthrough tensors.",
)
def mtp_source_key_prefixes(
    original: Callable[..., tuple[str, ...]], source: Any, *configs: Any
) -> tuple[str, ...]:
    """Return the prefixes of tensors that an export leaves out: none for a supported model."""
    return () if any(map(is_supported, configs)) else original(source, *configs)


def _saving_bridge(auto_bridge: Any) -> SavesHuggingFace | None:
    config = getattr(auto_bridge.hf_pretrained, "config", auto_bridge.hf_pretrained)
    if not is_supported(config) or not dist.is_initialized():
        return None
    model_bridge = auto_bridge._model_bridge
    return model_bridge if isinstance(model_bridge, SavesHuggingFace) else None


def _options(original: Callable[..., None], *args: object, **kwargs: object) -> JSONObject:
    """Return the options of a call by name, with their defaults."""
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[3:])  # without self, model and path


def _call(
    save: Callable[..., None],
    auto_bridge: Any,
    model: Any,
    path: str | Path,
    options: JSONObject,
) -> SaveCall:
    model = model if isinstance(model, list) else [model]
    return SaveCall(
        hf_pretrained=auto_bridge.hf_pretrained,
        model=model,
        path=Path(path),
        weight_dtype=options["weight_dtype"],
        save_weights=functools.partial(save, auto_bridge, model, **options),
    )
