"""Exports DoRA's magnitudes: merged into the weights, or in an adapter folder of PEFT.

Megatron-Bridge 0.6.2 exports DoRA as if it were LoRA (`models/conversion/peft_bridge.py`): merged
weights and adapter folders lack the magnitudes, without a warning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, WeightConversionTask
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from megatron.core import parallel_state

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.json_types import JSONObject

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge as _ModelBridge
else:
    _ModelBridge = object

__all__ = ["DoRAExport"]

_MAGNITUDE = ".lora_magnitude_vector"  # in an adapter folder (peft/utils/save_and_load.py)


class DoRAExport(_ModelBridge):
    """A mixin for a MegatronModelBridge: its adapter exports include DoRA's magnitudes."""

    _magnitude_tasks: dict[str, WeightConversionTask]
    _magnitudes: dict[str, torch.Tensor]

    def build_adapter_conversion_tasks(
        self, megatron_model: Any, *args: object, **kwargs: object
    ) -> Any:
        """Build Megatron-Bridge's tasks, and keep one more for each adapter with a magnitude.

        A collective over pipeline ranks: all ranks get the same tasks.
        """
        tasks = super().build_adapter_conversion_tasks(megatron_model, *args, **kwargs)
        all_tasks = [task for group in tasks.values() for task in group]
        local: JSONObject = {}  # adapters with a magnitude on this pipeline rank
        for task in all_tasks:
            if task.linear_out_task.megatron_module is not None and task.adapter_key is None:
                prefix = task.linear_out_task.param_name.partition(".adapter.")[0]
                adapter, _ = self._get_adapter_wrap_module(
                    prefix, megatron_model, task.linear_out_task.vp_stage
                )
                if hasattr(adapter, "weight_magnitude"):
                    local[task.global_base_prefix] = adapter
        group = parallel_state.get_pipeline_model_parallel_group()
        by_rank: list[list[str]] = [[] for _ in range(group.size())]
        dist.all_gather_object(by_rank, sorted(local), group=group)
        names = {name for on_rank in by_rank for name in on_rank}
        self._magnitudes = {}
        self._magnitude_tasks = {
            task.global_base_prefix: self._magnitude_task(task, local.get(task.global_base_prefix))
            for task in all_tasks
            if task.global_base_prefix in names
        }
        return tasks

    def _magnitude_task(self, task: Any, adapter: Any) -> WeightConversionTask:
        """Return the conversion of a magnitude; `adapter` is None on other pipeline ranks."""
        prefix = task.global_base_prefix
        is_row_parallel = isinstance(task.linear_in_task.mapping, RowParallelMapping)
        mapping = ReplicatedMapping if is_row_parallel else ColumnParallelMapping
        name = f"{prefix}.adapter.weight_magnitude"
        return WeightConversionTask(
            param_name=name,
            global_param_name=name,
            mapping=mapping(name, f"{prefix}{_MAGNITUDE}"),
            pp_rank=task.linear_out_task.pp_rank,
            vp_stage=task.linear_out_task.vp_stage,
            megatron_module=adapter,
            param_weight=None if adapter is None else adapter.weight_magnitude,
        )

    def materialize_adapter_weights(self, adapter_tasks: Any) -> Any:
        """Gather the adapters' matrices, keep their magnitudes [O]; a collective of all ranks."""
        for adapter_task in adapter_tasks:
            prefix = adapter_task.global_base_prefix
            if (task := self._magnitude_tasks.get(prefix)) is not None:
                gathered = task.mapping.megatron_to_hf(task.param_weight, task.megatron_module)
                self._magnitudes[prefix] = next(iter(gathered.values())).detach()
        return super().materialize_adapter_weights(adapter_tasks)

    def _reject_adapters_that_peft_misreads(self, megatron_model: Any) -> None:
        """Reject adapters on the MLP of a model with experts.

        PEFT (0.21) takes the gate, up and down projections of such a model for its fused experts,
        whatever module an adapter is for, and drops those of shared experts and dense layers
        without a warning.
        """
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        if not model[0].config.num_moe_experts:
            return
        names = [info[0] for info in self._megatron_global_adapters_info_all_pp_ranks(model)]
        if in_mlp := sorted(name for name in names if ".mlp." in name):
            raise UnsupportedConfig(
                "adapter",
                got=in_mlp[0],
                wanted="on attention's linears, for PEFT's format of a model with experts",
                where="adapter export",
                remedy="export the merged model (save_hf_pretrained), or adapt linear_qkv and "
                "linear_proj only",
            )

    def _magnitudes_by_name(
        self, megatron_model: Any, names: list[str], prefix: str
    ) -> dict[str, torch.Tensor]:
        """Map Hugging Face weights to magnitudes [O, 1], split as matrix B by Megatron-Bridge."""
        column = self._magnitudes[prefix][:, None]
        return self._get_fused_adapter_linear_out_slices(megatron_model, names, column) or {
            names[0]: column
        }

    def _merge_lora_adapter_weights(
        self, megatron_model: Any, converted: JSONObject, adapters: Any
    ) -> Any:
        """Merge an adapter into its weights [O, I].

        LoRA's W + s B A is Megatron-Bridge's; DoRA's is m (W + s B A) / |W + s B A| row by row
        (equation 5 of https://arxiv.org/abs/2402.09353), in fp32 and rounded once at the end.
        """
        prefix = adapters[0].global_base_prefix
        if not converted or prefix not in self._magnitudes:
            return super()._merge_lora_adapter_weights(megatron_model, converted, adapters)
        in_fp32 = {name: weight.float() for name, weight in converted.items()}
        merged = super()._merge_lora_adapter_weights(megatron_model, in_fp32, adapters)
        magnitudes = self._magnitudes_by_name(megatron_model, list(merged), prefix)
        return {
            name: (magnitudes[name].to(weight) * weight / weight.norm(dim=1, keepdim=True)).to(
                converted[name].dtype
            )
            for name, weight in merged.items()
        }

    def stream_adapter_weights_megatron_to_hf(
        self, megatron_model: Any, *args: object, **kwargs: object
    ) -> Iterable[HFWeightTuple]:
        """Yield the matrices A and B, then DoRA's magnitudes [O], under PEFT's names.

        Raises:
            UnsupportedConfig: adapters on MLP linears of a model with experts.
        """
        self._reject_adapters_that_peft_misreads(megatron_model)
        yield from super().stream_adapter_weights_megatron_to_hf(megatron_model, *args, **kwargs)
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        on_cpu = kwargs.get("cpu", args[0] if args else True)
        registry = self.mapping_registry()
        for prefix in sorted(getattr(self, "_magnitudes", {})):
            names = self._get_base_hf_param_names_for_adapter(registry, prefix, None, ".weight")
            for name, magnitude in self._magnitudes_by_name(model, names, prefix).items():
                vector = magnitude[:, 0].contiguous()
                yield HFWeightTuple(
                    name.removesuffix(".weight") + _MAGNITUDE, vector.cpu() if on_cpu else vector
                )
