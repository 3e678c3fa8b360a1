"""DoRA whole: one norm over tensor-parallel ranks, and magnitudes that leave with the adapters.

Megatron-Bridge 0.6.2 trains DoRA (`megatron/bridge/peft/dora_layers.py`) and exports it as if it were LoRA
(`models/conversion/peft_bridge.py`): merged weights and adapter folders come without their magnitudes, silently. And
the norm of a row-parallel weight is that of each rank's part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from exaone_bridge.errors import UnsupportedConfig

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge as _Host
else:
    _Host = object

__all__ = ["DoRAExport", "make_dora_whole", "refuse_inexact_dora"]

_MAGNITUDE = ".lora_magnitude_vector"  # in a PEFT folder (peft/utils/save_and_load.py)
_LORA = (".lora_A.weight", ".lora_B.weight")


def refuse_inexact_dora(wrapper: torch.nn.Module, linear: torch.nn.Module, adapter: Any) -> None:
    """Refuse what the host's DoRA gets wrong and nobody can put right from outside.

    Raises:
        UnsupportedConfig: DoRA on routed experts, or with dropout on a linear with its norm on its input.
    """
    from megatron.bridge.peft.dora_layers import DoRALinear
    from megatron.bridge.peft.utils import is_expert_linear

    if not isinstance(wrapper, DoRALinear):
        return
    name = adapter.base_linear_name
    if is_expert_linear(name):
        raise UnsupportedConfig(
            "DoRA target_modules",
            got=name,
            wanted="linears outside routed experts",
            where="peft",
            remedy="use LoRA for experts, or name attention's linears (linear_qkv, linear_proj)",
        )
    if not isinstance(adapter.dropout, torch.nn.Identity) and hasattr(linear, "layer_norm_weight"):
        # Its correction for dropout sends the difference of two normalised inputs through the norm once more.
        raise UnsupportedConfig(
            "DoRA dropout",
            got=adapter.dropout.p,
            wanted=f"0 on a linear with its norm on its input ({name})",
            where="peft",
            remedy="set dropout=0.0, or use LoRA",
        )


def make_dora_whole() -> None:
    """Teach the host's DoRA about tensor parallelism, and its writer of PEFT folders about magnitudes; idempotent."""
    from megatron.bridge.models.conversion import peft_bridge
    from megatron.bridge.peft.dora_layers import DoRALinear, ParallelLinearDoRAAdapter

    norm, start = DoRALinear._get_weight_norm, ParallelLinearDoRAAdapter.init_weight_magnitude
    infer = peft_bridge.infer_rank_pattern_from_adapter_weights
    if hasattr(norm, "_exaone_bridge"):
        return

    @functools.wraps(norm)
    def whole_norm(self: DoRALinear) -> torch.Tensor:
        """[O / tp] of a column-parallel linear, whose rows are whole; [O] of a row-parallel one, over all its parts."""
        found = norm(self)
        if self.adapter.input_is_parallel and self.adapter.tp_group.size() > 1:
            squares = found.float().square()
            dist.all_reduce(squares, group=self.adapter.tp_group)
            found = squares.sqrt().to(found.dtype)
        return found

    @functools.wraps(start)
    def start_marked(self: ParallelLinearDoRAAdapter, value: torch.Tensor) -> None:
        start(self, value)
        if (
            self.input_is_parallel
        ):  # every rank has all of it, and with sequence parallelism sees a part of the tokens
            self.weight_magnitude.sequence_parallel = self.config.sequence_parallel
        else:  # cut like the rows, and counted so in the norm of all gradients
            self.weight_magnitude.tensor_model_parallel = True
            self.weight_magnitude.partition_dim, self.weight_magnitude.partition_stride = 0, 1

    @functools.wraps(infer)
    def infer_from_matrices(weights: Iterable[Any], **kwargs: Any) -> dict[str, int]:
        return infer([weight for weight in weights if weight.param_name.endswith(_LORA)], **kwargs)

    whole_norm._exaone_bridge = True  # type: ignore[attr-defined]
    DoRALinear._get_weight_norm = whole_norm
    ParallelLinearDoRAAdapter.init_weight_magnitude = start_marked
    peft_bridge.infer_rank_pattern_from_adapter_weights = infer_from_matrices


class DoRAExport(_Host):
    """Mixin before MegatronModelBridge: merged weights and adapter streams with DoRA's magnitudes."""

    def build_adapter_conversion_tasks(self, megatron_model: Any, *args: Any, **kwargs: Any) -> Any:
        """The host's tasks; on the way, one more for each adapter with a magnitude, the same on every rank."""
        from megatron.bridge.models.conversion.model_bridge import WeightConversionTask
        from megatron.bridge.models.conversion.param_mapping import (
            ColumnParallelMapping,
            ReplicatedMapping,
            RowParallelMapping,
        )
        from megatron.core import parallel_state

        tasks = super().build_adapter_conversion_tasks(megatron_model, *args, **kwargs)
        held: dict[str, Any] = {}
        for task in (task for group in tasks.values() for task in group):
            if task.linear_out_task.megatron_module is not None and task.adapter_key is None:
                prefix = task.linear_out_task.param_name.partition(".adapter.")[0]
                adapter, _ = self._get_adapter_wrap_module(
                    prefix, megatron_model, task.linear_out_task.vp_stage
                )
                if hasattr(adapter, "weight_magnitude"):
                    held[task.global_base_prefix] = adapter
        group = parallel_state.get_pipeline_model_parallel_group()
        everyones: list[list[str]] = [[] for _ in range(group.size())]
        dist.all_gather_object(everyones, sorted(held), group=group)
        names = {name for own in everyones for name in own}
        self._magnitude_tasks: dict[str, Any] = {}
        for task in (task for group in tasks.values() for task in group):
            prefix = task.global_base_prefix
            if prefix in names:
                whole = isinstance(task.linear_in_task.mapping, RowParallelMapping)
                name = f"{prefix}.adapter.weight_magnitude"
                self._magnitude_tasks[prefix] = WeightConversionTask(
                    param_name=name,
                    global_param_name=name,
                    mapping=(ReplicatedMapping if whole else ColumnParallelMapping)(
                        name, f"{prefix}{_MAGNITUDE}"
                    ),
                    pp_rank=task.linear_out_task.pp_rank,
                    vp_stage=task.linear_out_task.vp_stage,
                    megatron_module=held.get(prefix),
                    param_weight=held[prefix].weight_magnitude if prefix in held else None,
                )
        self._magnitudes: dict[str, torch.Tensor] = {}
        return tasks

    def materialize_adapter_weights(self, adapter_tasks: Any) -> Any:
        """The host's, and this adapter's magnitude [O]; every rank takes part."""
        for adapter_task in adapter_tasks:
            task = self._magnitude_tasks.get(adapter_task.global_base_prefix)
            if task is not None:
                found = task.mapping.megatron_to_hf(task.param_weight, task.megatron_module)
                self._magnitudes[adapter_task.global_base_prefix] = next(
                    iter(found.values())
                ).detach()
        return super().materialize_adapter_weights(adapter_tasks)

    def _refuse_what_peft_misreads(self, megatron_model: Any) -> None:
        """PEFT (0.21) takes gate, up and down projections of such a model for its fused experts, whatever module an
        adapter is for, and drops those of shared experts and dense layers without a word."""
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        if not model[0].config.num_moe_experts:
            return
        found = sorted(
            info[0]
            for info in self._megatron_global_adapters_info_all_pp_ranks(model)
            if ".mlp." in info[0]
        )
        if found:
            raise UnsupportedConfig(
                "adapter",
                got=found[0],
                wanted="on attention's linears, for PEFT's format of a model with experts",
                where="adapter export",
                remedy="export the merged model (save_hf_pretrained), or adapt linear_qkv and linear_proj only",
            )

    def _magnitudes_by_name(
        self, megatron_model: Any, names: list[str], prefix: str
    ) -> dict[str, torch.Tensor]:
        """Hugging Face weight -> its magnitude [rows, 1]; what the host splits B by splits them, too."""
        column = self._magnitudes[prefix][:, None]
        return self._get_fused_adapter_linear_out_slices(megatron_model, names, column) or {
            names[0]: column
        }

    def _merge_lora_adapter_weights(
        self, megatron_model: Any, converted: dict[str, Any], adapters: Any
    ) -> Any:
        """W + s B A, as the host has it; of DoRA m (W + s B A) / |W + s B A|, row by row (equation 5 of the paper)."""
        prefix = adapters[0].global_base_prefix
        if not converted or prefix not in self._magnitudes:
            return super()._merge_lora_adapter_weights(megatron_model, converted, adapters)
        types = {name: weight.dtype for name, weight in converted.items()}
        whole = {
            name: weight.float() for name, weight in converted.items()
        }  # rounded once, at the end
        merged = super()._merge_lora_adapter_weights(megatron_model, whole, adapters)
        magnitudes = self._magnitudes_by_name(megatron_model, list(merged), prefix)
        return {
            name: (magnitudes[name].to(weight) * weight / weight.norm(dim=1, keepdim=True)).to(
                types[name]
            )
            for name, weight in merged.items()
        }

    def stream_adapter_weights_megatron_to_hf(
        self, megatron_model: Any, *args: Any, **kwargs: Any
    ) -> Iterable[Any]:
        """The host's stream of A and B, then DoRA's magnitudes by the names that PEFT has for them.

        Raises:
            UnsupportedConfig: adapters on feed-forward linears of a model with experts.
        """
        from megatron.bridge.models.conversion.model_bridge import HFWeightTuple

        self._refuse_what_peft_misreads(megatron_model)
        yield from super().stream_adapter_weights_megatron_to_hf(megatron_model, *args, **kwargs)
        model = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        registry = self.mapping_registry()
        for prefix in sorted(getattr(self, "_magnitudes", {})):
            names = self._get_base_hf_param_names_for_adapter(registry, prefix, None, ".weight")
            for name, magnitude in self._magnitudes_by_name(model, names, prefix).items():
                vector = magnitude[:, 0].contiguous()
                on_cpu = kwargs.get("cpu", args[0] if args else True)
                yield HFWeightTuple(
                    name.removesuffix(".weight") + _MAGNITUDE, vector.cpu() if on_cpu else vector
                )
