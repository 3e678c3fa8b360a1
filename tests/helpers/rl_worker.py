"""A worker as RL frameworks start it; neither this module nor what it imports names our package.

Each function makes the calls of one framework; `docs/rl` cites the files that they are in. The
state of Megatron-Core is set up and destroyed by the framework's worker, here by `_layout`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file

LORA = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.0}
ATTENTION, MLP = ["linear_qkv", "linear_proj"], ["linear_fc1", "linear_fc2"]
MOE = {
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
Weights = Iterable[tuple[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker converts, and where it writes what the inference engine would receive.

    Attributes:
        has_experts: PEFT's format has no adapters of a model's MLPs then.
        first: a Hugging Face folder.
        second: a folder of the same config with other weights.
        output: a folder; `<framework>-tp<n>-<round>-<rank>.safetensors` appear in it.
    """

    has_experts: bool
    first: Path
    second: Path
    output: Path


def main(rank: int, store: str, jobs: list[Job]) -> None:
    """Run every framework's calls on every job at TP 2 and 1, as one of two ranks."""
    assert "exaone_bridge" in sys.modules, "Python did not import exaone_bridge when it started"
    import megatron.bridge  # the framework imports it first, and nobody names exaone_bridge

    assert megatron.bridge.AutoBridge
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with sys.modules["exaone_bridge"].cpu_runtime():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        for job in jobs:
            for tp in (2, 1):
                for framework in (verl, nemo_rl, slime):
                    with _layout(tp, expert_tp=1 if framework is nemo_rl else tp):
                        framework(job, tp)
        dist.destroy_process_group()


@contextlib.contextmanager
def _layout(tp: int, expert_tp: int) -> Iterator[None]:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_tensor_parallel_size=expert_tp
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    yield
    parallel_state.destroy_model_parallel()
    for backend in ("FLASH", "FUSED", "UNFUSED"):  # Megatron-Core sets them for a whole process
        os.environ.pop(f"NVTE_{backend}_ATTN", None)


def _write(job: Job, framework: str, tp: int, name: str, weights: Weights) -> None:
    """Write what one rank has received; a name that comes twice is an error."""
    received: dict[str, torch.Tensor] = {}
    for key, weight in weights:
        assert key not in received, key
        received[key] = weight.detach().clone().contiguous()
    save_file(received, job.output / f"{framework}-tp{tp}-{name}-{dist.get_rank()}.safetensors")


def verl(job: Job, tp: int) -> None:
    """verl/workers/engine/megatron/transformer_impl.py: full weights, then adapters."""
    _verl(job, tp, lora=None)
    _verl(job, tp, lora=LORA | {"target_modules": ATTENTION + ([] if job.has_experts else MLP)})


def _verl(job: Job, tp: int, lora: dict[str, Any] | None) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.utils import create_peft, create_peft_hook
    from megatron.bridge.training.utils.config_utils import create_ddp_config
    from megatron.core.transformer.enums import AttnBackend

    bridge = AutoBridge.from_hf_pretrained(str(job.first), trust_remote_code=False)
    provider = bridge.to_megatron_provider(load_weights=False)
    overrides = MOE | {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": tp > 1,
        "overlap_p2p_comm": False,
        "batch_p2p_comm": False,
        "variable_seq_lengths": True,
        "attention_backend": AttnBackend.flash,
        "recompute_granularity": None,
        "recompute_modules": ["core_attn"],
        "recompute_method": None,
        "recompute_num_layers": None,
        "use_cpu_initialization": True,  # override_transformer_config, for this test only
    }
    provider.apply_overrides_and_finalize(dtype=torch.bfloat16, overrides=overrides)
    if lora is not None:
        peft = create_peft(lora, dtype=torch.bfloat16)
        provider.register_pre_wrap_hook(create_peft_hook(peft, training=True))
    module = provider.provide_distributed_model(
        wrap_with_ddp=True,
        ddp_config=create_ddp_config(wrap_with_ddp=True, use_distributed_optimizer=True),
        fp16=provider.fp16,
        bf16=provider.bf16,
    )
    bridge.load_hf_weights(module, str(job.first), allowed_mismatched_params=[])
    tasks = bridge.get_conversion_tasks(module)
    if lora is None:
        for name, source in (("first", job.first), ("second", job.second)):
            bridge.load_hf_weights(module, str(source), allowed_mismatched_params=[])
            with _rounds_build_nothing(bridge._model_bridge):
                weights = bridge.export_hf_weights(module, conversion_tasks=tasks)
                _write(job, "verl", tp, name, weights)
        return
    _fill_adapters(module)
    base = bridge.export_hf_weights(module, conversion_tasks=tasks, merge_adapter_weights=False)
    _write(job, "verl", tp, "base", base)
    _write(job, "verl", tp, "adapter", bridge.export_adapter_weights(module))
    _write(job, "verl", tp, "merged", bridge.export_hf_weights(module, conversion_tasks=tasks))


@contextlib.contextmanager
def _rounds_build_nothing(model_bridge: Any) -> Iterator[None]:
    """Let an export fail that builds tasks, or an object for each tensor, which is slow."""
    with (
        mock.patch.object(type(model_bridge), "build_conversion_tasks", None),
        mock.patch.object(type(model_bridge.description), "hf_tensors", None),
    ):
        yield


def _fill_adapters(module: list[torch.nn.Module]) -> None:
    """Give every adapter weights that are equal on all ranks that hold the same slice."""
    with torch.no_grad():
        for chunk in module:
            for name, parameter in chunk.named_parameters():
                if ".adapter." in name:
                    parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))


def nemo_rl(job: Job, tp: int) -> None:
    """nemo_rl/models/megatron/community_import.py and policy/workers/megatron_policy_worker.py."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_model_config

    checkpoint = job.output / f"nemo-rl-tp{tp}"
    bridge = AutoBridge.from_hf_pretrained(str(job.first), trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=True)
    provider.tensor_model_parallel_size = tp
    provider.pipeline_model_parallel_size = 1
    provider.context_parallel_size = 1
    provider.expert_model_parallel_size = 1
    provider.expert_tensor_parallel_size = 1
    provider.num_layers_in_first_pipeline_stage = None
    provider.num_layers_in_last_pipeline_stage = None
    provider.pipeline_dtype = torch.bfloat16
    provider.sequence_parallel = tp > 1
    provider.gradient_accumulation_fusion = False
    provider.use_cpu_initialization = True  # for this test only
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, post_wrap_hook=None)
    model[0].config.tensor_model_parallel_size = 1
    bridge.save_megatron_model(model, str(checkpoint))

    config, _ = load_model_config(str(checkpoint / "iter_0000000"))
    for field, value in MOE.items():
        setattr(config, field, value)
    config.tensor_model_parallel_size = tp
    config.expert_tensor_parallel_size = 1
    config.sequence_parallel = tp > 1
    config.moe_router_dtype = "fp64"
    config.moe_router_bias_update_rate = 0.0
    config.moe_enable_deepep = False
    config.moe_shared_expert_overlap = False
    config.moe_permute_fusion = True
    config.apply_rope_fusion = True
    config.bias_activation_fusion = True
    config.gradient_accumulation_fusion = False
    config.mtp_num_layers = 0
    config.bf16, config.params_dtype = True, torch.bfloat16
    config.pipeline_dtype, config.parallel_output = torch.bfloat16, True
    config.use_cpu_initialization = True  # for this test only
    config.perform_initialization = False
    config.finalize()
    assert config.provide_distributed_model(wrap_with_ddp=False)
    layout = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "expert_tensor_parallel_size": 1,
    }
    (policy,) = bridge.load_megatron_model(str(checkpoint), mp_overrides=layout)
    bridge = AutoBridge.from_hf_pretrained(str(job.first), trust_remote_code=True)
    tasks = [task for task in bridge.get_conversion_tasks([policy]) if task is not None]
    for task in tasks:  # NeMo-RL computes the size of what it sends from these
        assert task.mapping.tp_size == (1 if task.mapping.is_expert else tp)
        assert task.mapping.ep_size == 1 and task.param_name

    def refit() -> Weights:
        return bridge.export_hf_weights([policy], show_progress=False, conversion_tasks=tasks)

    described = {name: (weight.shape, weight.dtype) for name, weight in refit()}
    with _meta_tensors():
        assert described == {name: (weight.shape, weight.dtype) for name, weight in refit()}
    _write(job, "nemo-rl", tp, "first", refit())
    bridge.load_hf_weights([policy], str(job.second))
    _write(job, "nemo-rl", tp, "second", refit())


@contextlib.contextmanager
def _meta_tensors() -> Iterator[None]:
    """Let an export yield names and shapes only; NeMo-RL describes what it sends in this way."""

    def empty(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    with contextlib.ExitStack() as stack:
        for module, name, stub in (
            (dist, "all_gather", lambda *_, **__: None),
            (dist, "broadcast", lambda *_, **__: None),
            (torch, "empty_like", empty),
            (torch, "zeros_like", empty),
        ):
            stack.enter_context(mock.patch.object(module, name, stub))
        yield


def slime(job: Job, tp: int) -> None:
    """slime v0.3.0, slime/backends/megatron_utils: tasks with weights from a copy, lazily."""
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(job.first), trust_remote_code=True)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.tensor_model_parallel_size = tp
    provider.sequence_parallel = tp > 1
    provider.variable_seq_lengths = True
    provider.moe_token_dispatcher_type = "alltoall"
    provider.use_cpu_initialization = True  # for this test only
    provider.finalize()
    model = [provider.provide(pre_process=True, post_process=True, vp_stage=None)]
    for folder, name in ((job.first, "first"), (job.second, "second")):
        AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True).load_hf_weights(model)
        tensors = itertools.chain(model[0].named_parameters(), model[0].named_buffers())
        copies = {key: tensor.clone() for key, tensor in tensors}
        tasks = _Replaced(bridge.get_conversion_tasks(model), copies)
        weights = bridge.export_hf_weights(model, cpu=False, conversion_tasks=tasks)
        _write(job, "slime", tp, name, weights)


class _Replaced:
    """Conversion tasks whose weights come from a copy, made when they are needed."""

    def __init__(self, tasks: list[Any], weights: dict[str, torch.Tensor]) -> None:
        self._tasks, self._weights = tasks, weights

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Any]:
        for task in self._tasks:
            yield dataclasses.replace(task, param_weight=self._weights[task.param_name])
