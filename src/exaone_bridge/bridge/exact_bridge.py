"""The base class of our model bridges: exact conversion from one table of parameter mappings."""

from __future__ import annotations

import copy
import logging
from abc import abstractmethod
from collections.abc import Iterable
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
from megatron.core.utils import get_model_config, unwrap_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exaone_bridge.bridge import save
from exaone_bridge.bridge.dora_export import DoRAExport
from exaone_bridge.bridge.eligibility import (
    local_model,
    log_method,
    log_notes,
    safetensors_folder,
    source_of,
    why_not_planned_load,
)
from exaone_bridge.bridge.fp8 import updated_fp8_init_values
from exaone_bridge.bridge.hf_source import hf_config_dict, raw_config
from exaone_bridge.bridge.mapping_registry import make_mapping_registry
from exaone_bridge.checkpoint.coverage import BUILD_FROM_CONFIG, check_coverage
from exaone_bridge.checkpoint.hf.accept import dtype_of_weights, names_dtype
from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.checkpoint.hf.headers import read_headers
from exaone_bridge.checkpoint.reshard.load import load_weights
from exaone_bridge.errors import UnmappedTensors, UnsupportedConfig
from exaone_bridge.modules.provider import ExactGPTModelProvider
from exaone_bridge.patches.auto_bridge_save import SaveCall, SavesHuggingFace
from exaone_bridge.schema.hf_spelling import in_new_spelling
from exaone_bridge.schema.json_types import JSONMapping, JSONObject
from exaone_bridge.schema.model_family import OUTPUT_LAYER, ModelDescription, ModelFamily

__all__ = ["ExactBridge"]

logger = logging.getLogger(__name__)

_OUTPUT_BIAS = "output_layer.bias"


class ExactBridge(DoRAExport, SavesHuggingFace, MegatronModelBridge):
    """A MegatronModelBridge that converts every tensor of both sides, or raises and names it.

    Subclasses set FAMILY, SOURCE_NAME, MODEL_TYPE, PROVIDER_CLASS and `provider_of`; all else
    follows from the family.
    """

    FAMILY: ClassVar[ModelFamily]

    # The Transformers config that the description was made from, and the description.
    _described: tuple[Any, ModelDescription] | None = None
    # The provider of the Megatron-Core model that was converted last, and its variant of FAMILY.
    _provider: Any = None
    _variant: ModelFamily | None = None

    @staticmethod
    @abstractmethod
    def provider_of(model_config: Any, hf_config: JSONMapping) -> Any:
        """Make the provider of a model config; it keeps `hf_config` for the export."""

    @property
    def description(self) -> ModelDescription:
        """The description of the model at hand, made once.

        Without a config it is that of the family's default model, whose mappings hold for any
        number of layers.

        Raises:
            UnsupportedConfig: the config is not supported.
        """
        family = self._variant or self.FAMILY
        if self._described is not None:
            config, description = self._described
            if config is self.hf_config and description.family is family:
                return description
        description = family.describe(
            {} if self.hf_config is None else hf_config_dict(self.hf_config),
            provider=self._provider,
        )
        self._described = self.hf_config, description
        return description

    def describe(
        self, hf_pretrained: Any, megatron_model: list[MegatronModule]
    ) -> ModelDescription:
        """Describe the model that is converted now; `description` is its description from now on.

        Args:
            hf_pretrained: Megatron-Bridge's wrapper of a Transformers model, or a config.
            megatron_model: this rank's chunks; they tell whether multi-token prediction is built.

        Raises:
            UnsupportedConfig: the config is not supported.
        """
        self._complete_dtype(hf_pretrained)
        self.hf_pretrained = hf_pretrained
        self.hf_config = getattr(hf_pretrained, "config", hf_pretrained)
        provider = get_model_config(megatron_model[0])
        if provider is not self._provider:
            self._provider, self._described = provider, None
        self._variant = self.FAMILY.variant_for(provider)
        return self.description

    def provider_bridge(self, hf_pretrained: Any) -> ExactGPTModelProvider:
        """Make the provider, a PROVIDER_CLASS, of a Hugging Face model (anything with `.config`).

        Raises:
            UnsupportedConfig: the config is not supported.
        """
        self._complete_dtype(hf_pretrained)
        config, tensors = raw_config(hf_pretrained), {}
        if self.FAMILY.optional_fp32 is not None and (folder := safetensors_folder(hf_pretrained)):
            tensors = read_headers(folder)
        dtypes = ((info.name, info.dtype) for info in tensors.values())
        description = self.FAMILY.describe(config, dtypes=dtypes)
        provider: ExactGPTModelProvider = self.provider_of(description.config, config)
        return provider

    @classmethod
    def config_json_of(
        cls, provider: ExactGPTModelProvider, source: JSONMapping | None = None
    ) -> JSONObject:
        """Make config.json of the model that this provider builds.

        Args:
            provider: a provider, or the config of a Megatron-Core model that it has built.
            source: the config.json whose spelling is kept; None: the one that the provider was
                made from.

        Raises:
            UnsupportedConfig: the provider was changed to a model that the config cannot express.
        """
        source = provider.hf_config if source is None else source
        return cls.FAMILY.write_hf_config(cls.FAMILY.model_config_of(provider), source)

    @classmethod
    def megatron_to_hf_config(cls, provider: ExactGPTModelProvider) -> JSONObject:
        """Make the config for Megatron-Bridge, which knows the keys of Transformers 5 only.

        Raises:
            UnsupportedConfig: as `config_json_of`, or an unlike provider of Megatron-Bridge's own.
        """
        if not isinstance(provider, cls.PROVIDER_CLASS):
            provider = cls.convert_provider(provider)
        config = in_new_spelling(cls.config_json_of(provider))
        config.pop("transformers_version", None)
        read = hf_config_dict(CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)))
        return {key: read.get(key, value) for key, value in config.items()}

    @classmethod
    def convert_provider(cls, provider: Any) -> ExactGPTModelProvider:
        """Make our provider of one of Megatron-Bridge's own that describes the same model.

        Raises:
            UnsupportedConfig: it describes another model, as those of most families do.
        """
        raise UnsupportedConfig(
            "provider",
            got=f"{type(provider).__module__}.{type(provider).__qualname__}",
            wanted=f"{cls.PROVIDER_CLASS.__module__}.{cls.PROVIDER_CLASS.__qualname__}",
            where="Megatron checkpoint",
            remedy="the checkpoint was written by Megatron-Bridge's own bridge: export it in a "
            "process that does not import exaone_bridge",
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Make Megatron-Bridge's mapping objects of the model at hand.

        Without a config, padded rows of the vocabulary are not removed.

        Raises:
            UnsupportedConfig: the config is not supported.
        """
        vocab_size = None if self.hf_config is None else self.description.config.vocab_size
        return make_mapping_registry(self.description.mappings, vocab_size)

    def build_conversion_tasks(
        self,
        hf_pretrained: Any,
        megatron_model: list[MegatronModule],
        weight_dtype: torch.dtype | None = None,
    ) -> list[WeightConversionTask]:
        """Build Megatron-Bridge's tasks after checking both sides; its own code only warns.

        Raises:
            UnmappedTensors: parameters of the model or tensors of the checkpoint are missing, or
                have no mapping.
        """
        model = self.describe(hf_pretrained, megatron_model)
        self._check_megatron(model, megatron_model)
        if (source := source_of(hf_pretrained)) is not None:
            names = [
                name
                for name in source.get_all_keys()
                if not model.is_passthrough(name) and not model.is_redundant(name)
            ]
            check_coverage(model.hf_shapes, names, where="Hugging Face checkpoint")
        tasks = super().build_conversion_tasks(
            hf_pretrained, megatron_model, weight_dtype=weight_dtype
        )
        if model.config.tied and _OUTPUT_BIAS in model.megatron_names:
            tasks.append(self._output_bias_task(megatron_model, weight_dtype))
        return tasks

    def load_weights_hf_to_megatron(
        self,
        hf_pretrained: Any,
        megatron_model: Any,
        allowed_mismatched_params: list[str] | None = None,
    ) -> list[MegatronModule]:
        """Fill a model from a Hugging Face model.

        The reshard plan copies the weights, or Megatron-Bridge converts them for the reasons that
        `bridge/eligibility.py` lists.

        Raises:
            UnmappedTensors: as `build_conversion_tasks`.
            CheckpointError: a damaged file, or a tensor of another shape than config.json says.
            UnsupportedLayout: the layout does not divide the model.
        """
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        why = why_not_planned_load(self, model, hf_pretrained, allowed_mismatched_params)
        log_method("Hugging Face -> Megatron-Core", why)
        folder = safetensors_folder(hf_pretrained)
        description = self.describe(hf_pretrained, model)
        source: HFCheckpoint | None = None
        if folder is not None and not allowed_mismatched_params:
            source = HFCheckpoint.open(folder, description.family)
            log_notes(source.notes)
        if why is not None or source is None:
            with updated_fp8_init_values(self, model):
                return super().load_weights_hf_to_megatron(
                    hf_pretrained, megatron_model, allowed_mismatched_params
                )
        self.unquantized_state_dict = None
        here = local_model(model)
        if not here.even_pipeline:  # each rank of an uneven pipeline checks its own stage only
            self._check_megatron(description, unwrap_model(model))
        load_weights(source, description, here)
        return model

    def stream_weights_megatron_to_hf(
        self, megatron_model: Any, hf_pretrained: Any, *args: object, **kwargs: object
    ) -> Iterable[HFWeightTuple]:
        """Yield every Hugging Face tensor exactly once, then the passthrough tensors.

        Raises:
            UnmappedTensors: from `build_conversion_tasks`, before anything is yielded; or tensors
                that were not exported, at the end.
        """
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        description = self.describe(hf_pretrained, model)
        exported: set[str] = set()
        embedding: torch.Tensor | None = None
        dtype = save.exported_dtype(model, kwargs.pop("weight_dtype", None))
        fp32, embedding_name = description.fp32_names, description.embedding_name
        for weight in super().stream_weights_megatron_to_hf(
            megatron_model, hf_pretrained, *args, **kwargs
        ):
            name, tensor = weight.param_name.replace(".base_layer", ""), weight.weight
            exported.add(name)
            wanted = torch.float32 if name in fp32 else dtype
            # Names are listed only if one is looked up: a refit repeats this every few seconds.
            if (
                tensor.dtype is not wanted
                and tensor.is_floating_point()
                and name in description.hf_shapes
            ):
                weight = weight._replace(weight=tensor.to(wanted))
            if name == embedding_name:
                embedding = weight.weight
            yield weight
        if kwargs.get("conversion_tasks") is not None:  # the caller chose what to export
            return
        if missing := description.hf_shapes.keys() - exported:
            raise UnmappedTensors(
                "tensors were not exported",
                missing,
                where="export",
                remedy="the output is not complete: delete it",
            )
        source = source_of(hf_pretrained)
        names = [] if source is None else source.get_all_keys()
        for name in save.passthrough_names(description, names, has_source=source is not None):
            yield HFWeightTuple(name, hf_pretrained.state[name])
        # Megatron-Bridge leaves out every file of the source that is not complete.
        for name in filter(description.is_redundant, names):
            if name == OUTPUT_LAYER and embedding is not None:
                yield HFWeightTuple(name, embedding.clone())
            else:
                yield HFWeightTuple(name, hf_pretrained.state[name])

    def needs_source(self, hf_config: Any) -> bool:
        """Return whether the config's model has passthrough tensors; see `SavesHuggingFace`."""
        return bool(self.FAMILY.describe(hf_config_dict(hf_config)).passthrough_tensors)

    def save_hf_weights(self, call: SaveCall) -> None:
        """Write a model's weights; see `SavesHuggingFace`."""
        save.save_hf_weights(self, call)

    def save_hf_pretrained(self, call: SaveCall, source_path: str | Path | None) -> None:
        """Write a model; see `SavesHuggingFace`."""
        save.save_hf_pretrained(self, call, source_path)

    def _complete_dtype(self, hf_pretrained: Any) -> None:
        """Write the dtype of the weights into a config that names none, as `HFCheckpoint` does."""
        hf_config = getattr(hf_pretrained, "config", None)
        if hf_config is None or names_dtype(config := hf_config_dict(hf_config)):
            return
        if (folder := safetensors_folder(hf_pretrained)) is not None:
            found = dtype_of_weights(self.FAMILY.describe(config), read_headers(folder))
            if found is not None:
                hf_config.dtype = getattr(torch, found[0])

    def _output_bias_task(
        self, megatron_model: list[MegatronModule], weight_dtype: torch.dtype | None
    ) -> WeightConversionTask:
        """Return the output layer's bias of a tied model.

        Megatron-Bridge's `build_conversion_tasks` (`model_bridge.py`, 0.6.2) drops every
        "output_layer" parameter of a tied model.
        """
        chunks = enumerate(unwrap_model(megatron_model))
        layers = ((stage, getattr(chunk, "output_layer", None)) for stage, chunk in chunks)
        stage, layer = next((pair for pair in layers if pair[1] is not None), (None, None))
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
        self, model: ModelDescription, megatron_model: list[MegatronModule]
    ) -> None:
        """Check the parameter names of all pipeline stages and expert ranks; a collective."""
        names = {
            self._get_lora_unwrapped_name(name)
            for name in self._megatron_global_param_names_all_pp_ranks(megatron_model)
            if "_quantizer." not in name  # Megatron-Bridge's own mappings cover quantizers
        }
        names = {model.aliases.get(name, name) for name in _over_expert_ranks(names)}
        if "output_layer.weight" not in model.megatron_names:
            names.discard("output_layer.weight")  # tied: the last stage's copy of the embedding
        check_coverage(
            model.megatron_names, names, where="Megatron-Core model", remedy=BUILD_FROM_CONFIG
        )


def _over_expert_ranks(names: set[str]) -> set[str]:
    """Return the names of all expert-parallel ranks, each of which knows its own experts only."""
    group = parallel_state.get_expert_model_parallel_group(check_initialized=False)
    if group is None or group.size() == 1:
        return names
    by_rank: list[set[str]] = [set()] * group.size()
    dist.all_gather_object(by_rank, names, group=group)
    return set().union(*by_rank)
