"""What all our bridges share: one table of rows, strict coverage on both sides, the configuration both ways."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    HFWeightTuple,
    MegatronModelBridge,
    WeightConversionTask,
)
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from exaone_bridge.bridge import eligibility, save
from exaone_bridge.bridge.dora_export import DoRAExport
from exaone_bridge.bridge.fp8 import updated_fp8_init_values
from exaone_bridge.bridge.mapping_registry import bind
from exaone_bridge.checkpoint.coverage import BUILD_FROM_CONFIG, check_coverage
from exaone_bridge.checkpoint.hf.headers import read_headers
from exaone_bridge.checkpoint.reshard.load import load
from exaone_bridge.errors import UnmappedTensors
from exaone_bridge.patches.auto_bridge_save import SaveCall, SavesHuggingFace
from exaone_bridge.schema.hf_files import COMPANION_FILES
from exaone_bridge.schema.model_family import ModelDescription, ModelFamily
from exaone_bridge.schema.param_mapping import ParamMapping, aliases, expected_hf, expected_megatron

__all__ = ["ExactBridge", "config_mapping"]

logger = logging.getLogger(__name__)

_OUTPUT_BIAS = "output_layer.bias"


def config_mapping(hf_config: Any) -> dict[str, Any]:
    """What `save_pretrained` would write for this Transformers config (or mapping), less the version stamp."""
    config = hf_config if isinstance(hf_config, Mapping) else json.loads(hf_config.to_json_string())
    return {key: value for key, value in config.items() if key != "transformers_version"}


class ExactBridge(DoRAExport, SavesHuggingFace, MegatronModelBridge):
    """A MegatronModelBridge that accounts for every tensor of both sides, or stops and names it."""

    ADDITIONAL_FILE_PATTERNS: ClassVar[list[str]] = list(COMPANION_FILES)

    FAMILY: ClassVar[ModelFamily]

    @staticmethod
    @abstractmethod
    def provider_of(model_config: Any, hf_config: Mapping[str, Any]) -> Any:
        """The family's: the provider of these facts; it carries the configuration for the export."""

    @staticmethod
    @abstractmethod
    def model_config_of(provider: Any) -> Any:
        """The family's: the facts of the model that this provider builds."""

    def _model_config(self) -> Any:
        return self.FAMILY.read_hf_config(config_mapping(self.hf_config))

    def provider_bridge(self, hf_pretrained: Any) -> Any:
        """The provider, a PROVIDER_CLASS, of a Hugging Face model (anything with `.config`).

        Raises:
            UnsupportedConfig: the configuration is not modelled.
        """
        config = config_mapping(hf_pretrained.config)
        return self.provider_of(self.FAMILY.read_hf_config(config), config)

    @classmethod
    def megatron_to_hf_config(cls, provider: Any) -> dict[str, Any]:
        """`config.json` of the model that this provider builds, as `save_pretrained` writes it, less the version.

        Raises:
            UnsupportedConfig: a model that the family's configuration has no words for.
        """
        return cls.FAMILY.write_hf_config(cls.model_config_of(provider), provider.hf_config)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The rows of the model at hand, bound to the host's mapping objects.

        A bridge that was given no configuration has the names of the family's default one, which hold for any number
        of layers, and does not know how many words to keep of a padded vocabulary.

        Raises:
            UnsupportedConfig: the configuration is not modelled.
        """
        if self.hf_config is None:
            return bind(self.FAMILY.mappings(self.FAMILY.read_hf_config({})), None)
        model_config = self._model_config()
        return bind(self.FAMILY.mappings(model_config), model_config.vocab_size)

    def build_conversion_tasks(
        self,
        hf_pretrained: Any,
        megatron_model: list[MegatronModule],
        weight_dtype: torch.dtype | None = None,
    ) -> list[WeightConversionTask]:
        """The host's tasks, once both sides are known to be covered; the host itself only warns.

        Raises:
            UnmappedTensors: a Megatron parameter without a row, a row without its parameter, a tensor of the
                checkpoint that no row claims, or one that a row claims and the checkpoint lacks.
        """
        self.hf_pretrained = hf_pretrained
        self.hf_config = getattr(hf_pretrained, "config", hf_pretrained)
        model_config = self._model_config()
        mappings = self.FAMILY.mappings(model_config)
        self._check_megatron(mappings, megatron_model)
        source = getattr(getattr(hf_pretrained, "state", None), "source", None)
        if source is not None:
            check_coverage(
                expected_hf(mappings, model_config.dims),
                [name for name in source.get_all_keys() if not self.FAMILY.is_passthrough(name)],
                where="Hugging Face checkpoint",
            )
        tasks = super().build_conversion_tasks(
            hf_pretrained, megatron_model, weight_dtype=weight_dtype
        )
        if model_config.tied and _OUTPUT_BIAS in expected_megatron(mappings):
            tasks.append(self._output_bias_task(megatron_model, weight_dtype))
        return tasks

    def load_weights_hf_to_megatron(
        self,
        hf_pretrained: Any,
        megatron_model: Any,
        allowed_mismatched_params: list[str] | None = None,
    ) -> list[MegatronModule]:
        """Fill a model from a Hugging Face model: by the plan of copies, or the host's way where that does not reach.

        Raises:
            UnmappedTensors: as `build_conversion_tasks`; the check is as strict on either way.
            CheckpointError, UnsupportedLayout: see `checkpoint/reshard/load.py`.
        """
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        why = eligibility.why_not(self, model)
        folder = eligibility.folder_of(hf_pretrained)
        if folder is None:
            why = why or "the source is no folder of safetensors files"
        if allowed_mismatched_params:
            why = why or "parameters of other shapes are allowed"
        if (
            type(self).maybe_modify_loaded_hf_weight
            is not MegatronModelBridge.maybe_modify_loaded_hf_weight
        ):
            why = why or "the bridge changes weights as it reads them"
        eligibility.say_once("Hugging Face -> Megatron-Core", why)
        if why is not None or folder is None:
            with updated_fp8_init_values(self, model):
                return super().load_weights_hf_to_megatron(
                    hf_pretrained, megatron_model, allowed_mismatched_params
                )
        self.hf_pretrained, self.hf_config = hf_pretrained, hf_pretrained.config
        self.unquantized_state_dict = None
        model_config = self._model_config()
        mappings = self.FAMILY.mappings(model_config)
        placed = eligibility.place_of(model)
        if not placed.even:  # of an uneven pipeline each rank knows its own stage only
            self._check_megatron(mappings, unwrap_model(model))
        load(folder, ModelDescription(self.FAMILY, model_config, mappings), placed)
        return model

    def _output_bias_task(
        self, megatron_model: list[MegatronModule], weight_dtype: torch.dtype | None
    ) -> WeightConversionTask:
        """The host's `build_conversion_tasks` drops every "output_layer" parameter of a tied model, its bias too."""
        held: list[Any] = [
            (stage, layer)
            for stage, chunk in enumerate(unwrap_model(megatron_model))
            if (layer := getattr(chunk, "output_layer", None)) is not None
        ]
        stage, layer = held[0] if held else (None, None)
        return WeightConversionTask(
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            vp_stage=stage,
            param_name=_OUTPUT_BIAS,
            global_param_name=_OUTPUT_BIAS,
            megatron_module=layer,
            param_weight=None if layer is None else layer.bias,
            mapping=self.mapping_registry().megatron_to_hf_lookup(_OUTPUT_BIAS),
            weight_dtype=weight_dtype,
        )

    def _check_megatron(
        self, mappings: Iterable[ParamMapping], megatron_model: list[MegatronModule]
    ) -> None:
        others = aliases(mappings)
        names = {
            self._get_lora_unwrapped_name(name)
            for name in self._megatron_global_param_names_all_pp_ranks(megatron_model)
            if "_quantizer." not in name  # the host's own mappings cover quantizers
        }
        names = {others.get(name, name) for name in _over_expert_ranks(names)}
        if "output_layer.weight" not in (expected := expected_megatron(mappings)):
            names.discard("output_layer.weight")  # tied: the last stage's copy of the embedding
        check_coverage(expected, names, where="Megatron-Core model", remedy=BUILD_FROM_CONFIG)

    def stream_weights_megatron_to_hf(
        self, megatron_model: Any, hf_pretrained: Any, *args: Any, **kwargs: Any
    ) -> Iterable[HFWeightTuple]:
        """The host's stream of (name, tensor); it must end with every tensor sent exactly once.

        Raises:
            UnmappedTensors: from `build_conversion_tasks`, before anything is sent; or names missing at the end.
        """
        sent: set[str] = set()
        for weight in super().stream_weights_megatron_to_hf(
            megatron_model, hf_pretrained, *args, **kwargs
        ):
            sent.add(weight.param_name.replace(".base_layer", ""))
            yield weight
        if kwargs.get("conversion_tasks") is None:  # a caller's own tasks are a caller's own choice
            model_config = self._model_config()
            missing = set(expected_hf(self.FAMILY.mappings(model_config), model_config.dims)) - sent
            if missing:
                raise UnmappedTensors(
                    "tensors were not exported",
                    missing,
                    where="export",
                    remedy="the output is not complete: delete it",
                )
            yield from self._passthrough(hf_pretrained, model_config)

    def save_hf_weights(self, call: SaveCall) -> None:
        """Write a model's weights; see `SavesHuggingFace`."""
        save.save_hf_weights(self, call)

    def save_hf_pretrained(self, call: SaveCall, source_path: str | Path | None) -> None:
        """Write a model; see `SavesHuggingFace`."""
        save.save_hf_pretrained(self, call, source_path)

    def to_be_saved(
        self, hf_pretrained: Any
    ) -> tuple[Any, tuple[ParamMapping, ...], dict[str, str] | None, dict[str, Any]]:
        """What the planned export must know: facts, rows, the source's file of each tensor, and tensors to be carried.

        Raises:
            UnmappedTensors: tensors should travel beside the model, and no source is at hand.
        """
        self.hf_pretrained, self.hf_config = (
            hf_pretrained,
            getattr(hf_pretrained, "config", hf_pretrained),
        )
        model_config = self._model_config()
        mappings = self.FAMILY.mappings(model_config)
        folder = eligibility.folder_of(hf_pretrained)
        if folder is None:
            if names := [tensor.name for tensor in self.FAMILY.passthrough_tensors(model_config)]:
                raise _out_of_reach(names)
            return model_config, mappings, None, {}
        tensors = read_headers(folder)
        files = {name: info.file.name for name, info in tensors.items()}
        passthrough = {
            name: info for name, info in tensors.items() if self.FAMILY.is_passthrough(name)
        }
        if passthrough and dist.get_rank() == 0:
            logger.info(
                "carried from the source unchanged: %d tensors (%s, ...)",
                len(passthrough),
                min(passthrough),
            )
        return model_config, mappings, files, passthrough

    def _passthrough(self, hf_pretrained: Any, model_config: Any) -> Iterable[HFWeightTuple]:
        """What the source ships beside the model, unread and unchanged.

        Raises:
            UnmappedTensors: the configuration says there is something, and no source is at hand.
        """
        source = getattr(getattr(hf_pretrained, "state", None), "source", None)
        if source is None:
            names = [tensor.name for tensor in self.FAMILY.passthrough_tensors(model_config)]
            if names:
                raise _out_of_reach(names)
            return
        names = sorted(name for name in source.get_all_keys() if self.FAMILY.is_passthrough(name))
        if names:
            logger.info(
                "carried from the source unchanged: %d tensors (%s, ...)", len(names), names[0]
            )
        for name in names:
            yield HFWeightTuple(name, hf_pretrained.state[name])


def _out_of_reach(names: list[str]) -> UnmappedTensors:
    return UnmappedTensors(
        "tensors that travel beside the model cannot be reached",
        names,
        where="export",
        remedy="export with the Hugging Face source at hand, or from a configuration without them "
        "(num_nextn_predict_layers 0)",
    )


def _over_expert_ranks(names: set[str]) -> set[str]:
    """The names of all expert-parallel ranks: each knows its own experts' only."""
    group = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    if group is None or group.size() == 1:
        return names
    everyones: list[set[str]] = [set()] * group.size()
    dist.all_gather_object(everyones, names, group=group)
    return set().union(*everyones)
