"""A model family, and the frozen description of one model. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.schema.param_mapping import (
    HFTensor,
    ParamMapping,
    aliases,
    expected_hf,
    expected_megatron,
    fp32_names,
    hf_tensors,
)

__all__ = [
    "FREQUENCIES",
    "OUTPUT_LAYER",
    "ImageSupport",
    "ModelDescription",
    "ModelFamily",
    "OptionalFp32",
    "PassthroughTensors",
    "TinyFiles",
]

OUTPUT_LAYER = "lm_head.weight"
FREQUENCIES = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")  # ends of names


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyFiles:
    """The tokenizer and processor files of a family's tiny models.

    Attributes:
        special_tokens: text -> token id.
        chat_template: Jinja.
        processor_files: config.json -> (file name -> JSON content), for models that take images.
    """

    special_tokens: Mapping[str, int]
    chat_template: str
    processor_files: Callable[[JSONMapping], Mapping[str, JSONMapping]] = lambda _: {}


@dataclass(frozen=True, kw_only=True, slots=True)
class PassthroughTensors:
    """Tensors that a checkpoint may hold beside the model: an export copies them untouched.

    Attributes:
        pattern: regular expression that the full name matches.
        tensors: model config -> the passthrough tensors of a checkpoint with this config.
        without: model config -> the config of the same model without passthrough tensors.
    """

    pattern: str
    tensors: Callable[[Any], tuple[HFTensor, ...]]
    without: Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionalFp32:
    """Tensors that some checkpoints of a family store in fp32, whatever the model's dtype.

    Attributes:
        pattern: regular expression that their full names match.
        provider_field: the field of the provider that says so.
        in_fp32: model config -> the config of the same model with these tensors in fp32.
    """

    pattern: str
    provider_field: str
    in_fp32: Callable[[Any], Any]

    def is_stored(self, dtypes: Iterable[tuple[str, str]]) -> bool:
        """Return whether any of these tensors is fp32.

        Args:
            dtypes: name and dtype, as safetensors has it, of every tensor of a checkpoint.
        """
        match = re.compile(self.pattern).fullmatch
        return any(dtype == "F32" and match(name) for name, dtype in dtypes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSupport:
    """What a family of models that take images adds. Both functions import torch when called.

    Attributes:
        prompts: (model config, number of prompts, seed, least length) -> tokens [N, S], and for
            each prompt the arguments of `forward` with its images.
        collators: () -> Transformers' processor class -> the function that makes a batch of
            conversations with images.
    """

    prompts: Callable[..., Any]
    collators: Callable[[], Mapping[str, Callable[..., Any]]]


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A family of models: how its config is read and written, and its parameter mappings.

    Attributes:
        name: of its folder in `models/`.
        architectures: the names in config.json's `architectures` that it supports.
        read_hf_config: config.json -> model config; raises UnsupportedConfig.
        write_hf_config: (model config, the config.json that the model came from) -> config.json.
        provider_class: the model provider's class, as `run_config.yaml` names it.
        model_config_of: model provider, or an object with its fields -> model config.
        mappings: model config -> parameter mappings.
        tiny: name -> config.json of a tiny model with a published topology.
        tiny_files: the tokenizer and processor files of the tiny models.
        images: for models that take images.
        passthrough: for checkpoints that may hold more than the model.
        with_mtp: the same models with multi-token prediction built into the Megatron-Core model,
            so that its tensors have mappings; None: it is not built.
        optional_fp32: for tensors whose dtype only the checkpoint tells.
    """

    name: str
    architectures: tuple[str, ...]
    read_hf_config: Callable[[JSONMapping], Any]
    write_hf_config: Callable[[Any, JSONMapping], JSONObject]
    provider_class: str
    model_config_of: Callable[[Any], Any]
    mappings: Callable[[Any], tuple[ParamMapping, ...]]
    tiny: Mapping[str, JSONMapping]
    tiny_files: TinyFiles
    images: ImageSupport | None = None
    passthrough: PassthroughTensors | None = None
    with_mtp: ModelFamily | None = None
    optional_fp32: OptionalFp32 | None = None

    def describe(
        self,
        hf_config: JSONMapping,
        *,
        dtypes: Iterable[tuple[str, str]] = (),
        provider: object = None,
    ) -> ModelDescription:
        """Read config.json and return the description of its model.

        Args:
            hf_config: config.json.
            dtypes: name and dtype, as safetensors has it, of every tensor of the checkpoint.
            provider: the provider or Megatron-Core config of the model.

        Raises:
            UnsupportedConfig: the config is malformed or not supported.
        """
        model_config = self.read_hf_config(hf_config)
        option = self.optional_fp32
        if option is not None and model_config.dtype != "float32":
            is_built = provider is not None and getattr(provider, option.provider_field, False)
            if is_built or option.is_stored(dtypes):
                model_config = option.in_fp32(model_config)
        return ModelDescription.of(self, model_config)

    def variant_for(self, provider: object) -> ModelFamily:
        """Return `with_mtp` if this provider or Megatron-Core config builds it."""
        builds_mtp = getattr(provider, "mtp_num_layers", None)
        return self.with_mtp if builds_mtp and self.with_mtp is not None else self

    def variant_with(self, parameters: Iterable[str]) -> ModelFamily:
        """Return `with_mtp` if a Megatron checkpoint has parameters of it."""
        if self.with_mtp is None or not any(name.startswith("mtp.") for name in parameters):
            return self
        return self.with_mtp

    def is_passthrough(self, name: str) -> bool:
        """Return whether the tensor of this name goes from source to export untouched."""
        pattern = None if self.passthrough is None else self.passthrough.pattern
        return pattern is not None and re.fullmatch(pattern, name) is not None

    def passthrough_tensors(self, model_config: ModelConfig) -> tuple[HFTensor, ...]:
        """Return the passthrough tensors of a checkpoint with this config."""
        return () if self.passthrough is None else self.passthrough.tensors(model_config)

    def without_passthrough(self, model_config: Any) -> Any:
        """Return the config of the same model without passthrough tensors."""
        return model_config if self.passthrough is None else self.passthrough.without(model_config)


@dataclass(frozen=True)
class ModelDescription:
    """One model: its family, its config, and the parameter mappings that follow from both.

    It is made once for each bridge and each checkpoint, and handed on.
    """

    family: ModelFamily
    config: ModelConfig
    mappings: tuple[ParamMapping, ...]

    @classmethod
    def of(cls, family: ModelFamily, model_config: ModelConfig) -> ModelDescription:
        """Return the description of the model that this config describes."""
        return cls(family, model_config, family.mappings(model_config))

    @property
    def dims(self) -> dict[str, int]:
        """Axis letter -> size (see `schema/param_mapping.py`)."""
        return self.config.dims

    @cached_property
    def hf_tensors(self) -> dict[str, HFTensor]:
        """Name -> each Hugging Face tensor that has a mapping."""
        return hf_tensors(self.mappings)

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each Hugging Face tensor that has a mapping."""
        return expected_hf(self.mappings, self.dims)

    @cached_property
    def fp32_names(self) -> set[str]:
        """The Hugging Face tensors that are fp32 on disk whatever the model's dtype."""
        return fp32_names(self.mappings)

    @cached_property
    def megatron_names(self) -> set[str]:
        """Every Megatron-Core parameter, over all pipeline stages and expert ranks."""
        return expected_megatron(self.mappings)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Other name of a Megatron-Core parameter -> its name in `megatron_names`."""
        return aliases(self.mappings)

    @property
    def passthrough_tensors(self) -> tuple[HFTensor, ...]:
        """The tensors that a checkpoint of this model has beside the model."""
        return self.family.passthrough_tensors(self.config)

    def is_passthrough(self, name: str) -> bool:
        """Return whether the tensor of this name goes from source to export untouched."""
        return self.family.is_passthrough(name)

    def is_redundant(self, name: str) -> bool:
        """Return whether a checkpoint may have this tensor although the model does not.

        Its values follow from the rest: a tied output layer, or the frequencies of RoPE. No export
        has it.
        """
        if name == OUTPUT_LAYER:
            return self.config.tied
        return name not in self.hf_shapes and name.endswith(FREQUENCIES)

    @property
    def embedding_name(self) -> str:
        """The name of the token embedding."""
        return next(
            mapping.hf[0].name
            for mapping in self.mappings
            if mapping.megatron == "embedding.word_embeddings.weight"
        )
