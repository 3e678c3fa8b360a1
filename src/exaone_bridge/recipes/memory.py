"""Estimate the GPU memory that a training plan needs, by formula. No torch.

- Parameters, gradients, optimizer: bf16 weights, fp32 gradients, and Adam's fp32 weight, mean and
  variance sharded over the d data-parallel replicas: 2 + 4 + 12 / d bytes per parameter
  (Megatron-Core's guide to its distributed optimizer; Rajbhandari et al. 2020, ZeRO stage 1).
  Frozen weights need 2.
- Activations: the tensors that the backward pass needs, counted one by one as in Korthikanti et
  al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4, for the
  layers of these models: no attention matrix (flash attention stores none), no dropout masks,
  SwiGLU, grouped-query attention. Activations outside the tensor-parallel linears are sharded only
  with sequence parallelism (section 4.2.2); a pipeline stage stores as many microbatches as the
  schedule has in flight (section 4.2.3; Megatron-Core 0.19.2, `pipeline_parallel/schedules.py`,
  `get_pp_rank_microbatches`).
- The logits: bf16, fp32 for the loss, and the gradient of the former.
- CUDA graphs, by what Transformer Engine 2.20's `make_graphed_callables` and Megatron-Core's
  `TECudaGraphHelper` allocate (`transformer/cuda_graphs.py`, `_get_sample_arguments`). For each
  captured layer and microbatch in flight: static buffers of the layer's input, its output and their
  gradients. And bf16 gradients of the captured parameters. A full iteration has static buffers of
  its batch instead; its activations take the place of those outside a graph. This part of the
  formula has not been compared with a measurement.
- FP8: Transformer Engine keeps the weights of linears in FP8, and transposed, between microbatches:
  2 bytes per parameter. What FP8 saves of activations is not subtracted. This has not been compared
  with a measurement either.

The formula does not count CUDA's context, NCCL's buffers, workspaces and fragmentation: `RESERVE`
stands for them. `IMBALANCE` allows for experts that get more than their share of the tokens.

Megatron-Bridge 0.6.2 has an estimator too (`training/utils/theoretical_memory_utils.py`). It is not
used here: it needs a ConfigContainer, hence torch and Megatron-Core; it has no adapters, vision
encoder or full recomputation, assumes that all dense parameters are sharded over TP, and its
activations are those of a layer with dropout masks and standard attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from exaone_bridge.recipes.cuda_graphs import CudaGraphs
from exaone_bridge.recipes.training_plan import TrainingPlan
from exaone_bridge.schema.model_config import ModelConfig, MoEConfig
from exaone_bridge.schema.model_family import ModelDescription
from exaone_bridge.schema.param_mapping import MappingKind

__all__ = ["GB", "RESERVE", "MemoryEstimate", "estimate", "estimate_stages"]

GB = 10**9
RESERVE = 8 * GB
IMBALANCE = 1.25
_NO_GRAPHS = CudaGraphs("off")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    graphs: float = 0.0

    @property
    def total(self) -> float:
        """The sum, with `RESERVE`."""
        tensors = self.parameters + self.gradients + self.optimizer + self.activations
        return tensors + self.graphs + RESERVE


@dataclass(frozen=True)
class _ParamCount:
    """Parameters on one GPU: `dense` ones have dp x cp replicas, `expert` ones edp.

    `in_layers` are those of `dense` that transformer layers have.
    """

    dense: float = 0
    expert: float = 0
    in_layers: float = 0

    @property
    def total(self) -> float:
        return self.dense + self.expert


def estimate(
    model: ModelDescription,
    plan: TrainingPlan,
    *,
    adapter_rank: int = 0,
    graphs: CudaGraphs = _NO_GRAPHS,
) -> MemoryEstimate:
    """Estimate the memory of the GPU that needs most.

    Args:
        model: the model to be trained.
        plan: the training plan.
        adapter_rank: the rank of LoRA, with everything else frozen; 0: all parameters are trained.
        graphs: the CUDA graphs of the run.
    """
    stages = estimate_stages(model, plan, adapter_rank=adapter_rank, graphs=graphs)
    return max(stages, key=lambda stage: stage.total)


def estimate_stages(
    model: ModelDescription,
    plan: TrainingPlan,
    *,
    adapter_rank: int = 0,
    graphs: CudaGraphs = _NO_GRAPHS,
) -> list[MemoryEstimate]:
    """Estimate the memory of one GPU of each pipeline stage; see `estimate` for the arguments."""
    return [
        _estimate_stage(model, plan, stage, adapter_rank, graphs) for stage in range(plan.layout.pp)
    ]


def _estimate_stage(
    model: ModelDescription,
    plan: TrainingPlan,
    stage: int,
    adapter_rank: int,
    graphs: CudaGraphs,
) -> MemoryEstimate:
    model_config = model.config
    base = _count(model, plan, stage)
    count = _count_adapters(model_config, plan, stage, adapter_rank)
    adapters = _ParamCount(count, in_layers=count)
    trained = adapters if adapter_rank else base
    frozen = base.total if adapter_rank else 0.0
    in_fp8 = 0.0 if plan.precision == "bf16" else base.in_layers + base.expert
    moe = [model_config.moe if is_moe else None for is_moe in model_config.moe_layer_mask]
    qk_norm = any("q_layernorm" in mapping.megatron for mapping in model.mappings)
    layers = _stage_layers(model_config.num_layers, plan, stage)
    per_pass = sum(_layer_bytes(model_config, plan, moe[layer], qk_norm) for layer in layers)
    activations = per_pass / plan.layout.vpp * _in_flight(plan, stage)
    if plan.recompute:  # one layer at a time is recomputed, and then stores all its activations
        full = replace(plan, recompute=False)
        activations += max(
            _layer_bytes(model_config, full, moe[layer], qk_norm) for layer in layers
        )
    if stage == plan.layout.pp - 1:
        tokens = plan.seq_length * plan.micro_batch_size / plan.cp
        activations += (2 + 4 + 2) * tokens * model_config.vocab_size / plan.layout.tp
    return MemoryEstimate(
        parameters=2 * (frozen + trained.total + in_fp8),
        gradients=4 * trained.total,
        optimizer=12 * (trained.dense / (plan.dp * plan.cp) + trained.expert / plan.edp),
        activations=activations,
        graphs=_graph_bytes(model_config, plan, stage, graphs, trained.in_layers),
    )


def _graph_bytes(
    model_config: ModelConfig,
    plan: TrainingPlan,
    stage: int,
    graphs: CudaGraphs,
    trained: float,
) -> float:
    """Return the bytes of what CUDA graphs hold beside activations.

    Args:
        model_config, plan, stage, graphs: see `estimate`.
        trained: trained parameters of this GPU's layers, without routed experts.
    """
    tokens = plan.seq_length * plan.micro_batch_size / plan.cp
    if graphs.kind == "off":
        return 0.0
    if graphs.kind == "full-iteration":  # tokens, labels, positions int64; loss mask fp32
        return (3 * 8 + 4) * tokens * plan.num_microbatches
    outside = tokens / (plan.layout.tp if plan.layout.sp else 1)
    per_layer = 4 * 2 * model_config.hidden_size * outside
    chunk = len(_stage_layers(model_config.num_layers, plan, stage)) / plan.layout.vpp
    return per_layer * chunk * _in_flight(plan, stage) + 2 * trained


def _stage_layers(num_layers: int, plan: TrainingPlan, stage: int) -> list[int]:
    """Return the global numbers of the layers of a pipeline stage, over all its virtual stages."""
    return [layer for chunk in plan.layout.stage_layers(num_layers)[stage] for layer in chunk]


def _count(model: ModelDescription, plan: TrainingPlan, stage: int) -> _ParamCount:
    model_config, layout, last = model.config, plan.layout, plan.layout.pp - 1
    layers = set(_stage_layers(model_config.num_layers, plan, stage))
    dense = expert = in_layers = 0.0
    for mapping in model.mappings:
        size = sum(math.prod(tensor.shape(model.dims)) for tensor in mapping.hf)
        if mapping.experts:
            share = mapping.experts / layout.ep / layout.expert_tp
            expert += size * share * len(layers.intersection(mapping.layers))
            continue
        replicated = mapping.kind in (MappingKind.REPLICATED, MappingKind.SQUEEZED)
        shard = size / (1 if replicated else layout.tp)
        if mapping.is_per_layer:
            in_layers += shard * len(layers.intersection(mapping.layers))
        elif mapping.on_first_stage:
            # The last stage of a model with tied embeddings has a replica of the embedding.
            tied = model_config.tied and mapping.kind is MappingKind.VOCAB
            dense += shard * ((stage == 0) or (tied and stage == last))
        else:
            dense += shard * (stage == last)
    return _ParamCount(dense + in_layers, expert, in_layers)


def _count_adapters(model_config: ModelConfig, plan: TrainingPlan, stage: int, rank: int) -> float:
    """Count LoRA's parameters on the attention and dense MLP linears; an upper bound."""
    dims = model_config.dims
    attention = dims["H"] + dims["Q"] + 2 * dims["K"] + dims["Q"] + dims["H"]
    mlp = 2 * dims["H"] + 3 * dims["F"]
    return rank * (attention + mlp) * len(_stage_layers(model_config.num_layers, plan, stage))


def _layer_bytes(
    model_config: ModelConfig, plan: TrainingPlan, moe: MoEConfig | None, qk_norm: bool
) -> float:
    """Return the bytes of activations that one layer stores per microbatch."""
    layout, dims = plan.layout, model_config.dims
    tokens = plan.seq_length * plan.micro_batch_size / plan.cp
    outside = tokens / (layout.tp if layout.sp else 1)  # of the tensor-parallel linears
    if plan.recompute:
        return 2 * dims["H"] * outside
    inside = tokens / layout.tp
    # Inputs and outputs of two norms (pre-norm), or of two sublayers (post-norm).
    stored = 8 * dims["H"] * outside
    # q, k, v as attention takes them, q and k before their norms, and attention's output.
    stored += 2 * (dims["Q"] + 2 * dims["K"]) * inside
    stored += 2 * (dims["Q"] + dims["K"]) * inside * qk_norm
    stored += 2 * dims["Q"] * inside
    if moe is None:
        return stored + 6 * dims["F"] * inside  # gate and up, and their product
    shared = 6 * dims.get("A", 0) * inside
    dispatched = tokens * moe.topk / layout.tp * layout.expert_tp * IMBALANCE
    return stored + shared + dispatched * (4 * dims["H"] + 6 * dims["M"] / layout.expert_tp)


def _in_flight(plan: TrainingPlan, stage: int) -> float:
    """Return the most forward passes of one virtual stage whose activations are stored at once."""
    pp, vpp = plan.layout.pp, plan.layout.vpp
    total = plan.num_microbatches * vpp
    if vpp == 1:
        return min(total, pp - stage)
    return min(total, (pp - stage - 1) * 2 + (vpp - 1) * pp + 1)
