"""What every room may ask of a family without knowing it. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from exaone_bridge.schema.param_mapping import HFTensor, ParamMapping

__all__ = ["ModelConfig", "ModelFamily", "dense_dims"]


class ModelConfig(Protocol):
    """What the facts of every family have in common."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def init_std(self) -> float: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def tied(self) -> bool: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def rope(self) -> tuple[bool, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def dims(self) -> dict[str, int]: ...


def dense_dims(model_config: ModelConfig) -> dict[str, int]:
    """Axis letter -> size, of the axes that every model has (the letters are `schema/param_mapping.py`'s)."""
    return {
        "V": model_config.vocab_size,
        "H": model_config.hidden_size,
        "F": model_config.ffn_size,
        "D": model_config.head_dim,
        "Q": model_config.num_heads * model_config.head_dim,
        "K": model_config.num_kv_heads * model_config.head_dim,
    }


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of models: how its configuration is read and written, its table of rows, and where its bridge is.

    Attributes:
        name: the folder's.
        architectures: what `config.json` calls it.
        read_config: `config.json` -> facts; raises UnsupportedConfig.
        write_config: facts and the configuration they came from -> `config.json`.
        rows: facts -> table.
        tiny: name -> configuration of a published topology in miniature.
        special_tokens: text -> id, for the tokenizer of a miniature.
        chat_template: Jinja, for the same.
        processor_files: name -> JSON, for the same: what its images and videos are prepared with.
        image_prompts: of a model that takes images: (facts, prompts, seed, positions) -> words
            [N, S], S at least the positions, and the arguments with the images of each prompt.
        collators: of a model that takes images: Transformers' processor class -> the function that makes a batch of
            conversations with images. Imports torch when it is called.
        carried: pattern of tensors that a checkpoint may ship beside the model: they survive a round trip unread.
        carried_tensors: facts -> those that a random checkpoint has.
        without_carried: facts -> those of the same model with nothing beside it.
        built: the same models, built with what else is carried.
        built_prefix: of the Megatron-Core parameters that tell so.
        listed_fields: Transformers' model type -> fields that may be lists of which its config class wants the first.
    """

    name: str
    architectures: tuple[str, ...]
    read_hf_config: Callable[[Mapping[str, Any]], Any]
    write_hf_config: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    mappings: Callable[[Any], tuple[ParamMapping, ...]]
    tiny: Mapping[str, Mapping[str, Any]]
    special_tokens: Mapping[str, int]
    chat_template: str
    processor_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    image_prompts: Callable[..., Any] | None = None
    collators: Callable[[], Mapping[str, Callable[..., Any]]] = dict
    passthrough: str | None = None
    passthrough_tensors: Callable[[Any], tuple[HFTensor, ...]] = lambda model_config: ()
    without_passthrough: Callable[[Any], Any] = lambda model_config: model_config
    built: ModelFamily | None = None
    built_prefix: str = ""
    listed_fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def holding(self, parameters: Iterable[str]) -> ModelFamily:
        """The family as a Megatron checkpoint with these parameters has it."""
        if self.built is None or not any(name.startswith(self.built_prefix) for name in parameters):
            return self
        return self.built

    def is_passthrough(self, name: str) -> bool:
        """Whether this tensor travels beside the model."""
        return self.passthrough is not None and re.fullmatch(self.passthrough, name) is not None
