"""What a plan needs of each GPU's memory, by formula. No torch.

- Parameters, gradients, optimizer: bf16 weights, fp32 gradients, and Adam's fp32 weight, mean and variance cut over
  the copies of the model: 2 + 4 + 12 / d bytes a parameter (Megatron-Core's guide to its distributed optimizer;
  Rajbhandari et al. 2020, ZeRO stage 1). Frozen weights need 2.
- Activations: what the backward pass keeps, counted tensor by tensor as in Korthikanti et al. 2022, "Reducing
  Activation Recomputation in Large Transformer Models", section 4, for the layers of these models: no attention
  matrix (flash attention keeps none), no dropout masks, SwiGLU, grouped-query attention. What lies between the cut
  linears is cut by tp only with sequence parallelism (section 4.2.2); stages keep as many micro batches as the schedule
  has in flight (section 4.2.3; Megatron-Core's `schedules.py`, `get_pp_rank_microbatches`).
- The output layer's logits: bf16, and fp32 for the loss, and the gradient of the first.

Not in the formula: CUDA's context, NCCL's buffers, workspaces and fragmentation. `RESERVE` stands for them, and
`IMBALANCE` for experts that get more than their share of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from exaone_bridge.recipes.plan import Plan
from exaone_bridge.schema.param_mapping import MappingKind, ParamMapping

__all__ = ["GB", "RESERVE", "Memory", "estimate", "stages"]

GB = 10**9
RESERVE = 8 * GB
IMBALANCE = 1.25


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs most."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, with the reserve."""
        return self.parameters + self.gradients + self.optimizer + self.activations + RESERVE


@dataclass(frozen=True)
class _Held:
    """Parameters on one GPU: `dense` are copied over dp x cp ranks, `expert` over edp."""

    dense: float = 0
    expert: float = 0


def _chunks(layers: int, plan: Plan, stage: int) -> list[int]:
    """Returns the global layer numbers of a stage."""
    return [layer for chunk in plan.layout.stage_layers(layers)[stage] for layer in chunk]


def _count(mappings: Iterable[ParamMapping], model_config: Any, plan: Plan, stage: int) -> _Held:
    layout, last = plan.layout, plan.layout.pp - 1
    held = set(_chunks(model_config.num_layers, plan, stage))
    dense = expert = 0.0
    for mapping in mappings:
        size = sum(math.prod(tensor.shape(model_config.dims)) for tensor in mapping.hf)
        if mapping.experts:
            share = mapping.experts / layout.ep / layout.expert_tp
            expert += size * share * len(held.intersection(mapping.layers))
            continue
        cut = size / (
            1 if mapping.kind in (MappingKind.REPLICATED, MappingKind.SQUEEZED) else layout.tp
        )
        if "*" in mapping.megatron:
            dense += cut * len(held.intersection(mapping.layers))
        elif mapping.megatron.startswith("embedding"):
            # A tied model's last stage has a copy of it.
            dense += cut * ((stage == 0) or (model_config.tied and stage == last))
        elif mapping.megatron.startswith("visual."):
            dense += cut * (stage == 0)
        else:
            dense += cut * (stage == last)
    return _Held(dense, expert)


def _adapters(model_config: Any, plan: Plan, stage: int, rank: int) -> float:
    """Parameters of LoRA on the four linears that the host's recipes adapt, experts left alone; an upper bound."""
    dims = model_config.dims
    attention = dims["H"] + dims["Q"] + 2 * dims["K"] + dims["Q"] + dims["H"]
    feed_forward = 2 * dims["H"] + 3 * dims["F"]
    return rank * (attention + feed_forward) * len(_chunks(model_config.num_layers, plan, stage))


def _layer(model_config: Any, plan: Plan, moe: bool, qk_norm: bool) -> float:
    """Bytes that one layer keeps of one micro batch."""
    layout, dims = plan.layout, model_config.dims
    tokens = plan.seq_length * plan.micro_batch / plan.cp
    between = tokens / (layout.tp if layout.sp else 1)
    if plan.recompute:
        return 2 * dims["H"] * between
    cut = tokens / layout.tp
    # Outside the cut linears: input and output of two norms (pre-norm), or inputs and outputs of two sublayers.
    kept = 8 * dims["H"] * between
    # q, k, v as attention takes them, again before the q and k norms, and attention's output.
    kept += 2 * (dims["Q"] + 2 * dims["K"]) * cut
    kept += 2 * (dims["Q"] + dims["K"]) * cut * qk_norm
    kept += 2 * dims["Q"] * cut
    if not moe:
        return kept + 6 * dims["F"] * cut  # gate and up, and their product
    shared = 6 * dims.get("A", 0) * cut
    dispatched = tokens * model_config.topk / layout.tp * layout.expert_tp * IMBALANCE
    return kept + shared + dispatched * (4 * dims["H"] + 6 * dims["M"] / layout.expert_tp)


def _in_flight(plan: Plan, stage: int) -> float:
    """Passes of one model chunk that a stage keeps at its fullest."""
    pp, vpp = plan.layout.pp, plan.layout.vpp
    total = plan.micro_batches * vpp
    if vpp == 1:
        return min(total, pp - stage)
    return min(total, (pp - stage - 1) * 2 + (vpp - 1) * pp + 1)


def stages(
    mappings: Iterable[ParamMapping], model_config: Any, plan: Plan, *, adapter_rank: int = 0
) -> list[Memory]:
    """The memory of a GPU of each pipeline stage; see `estimate`."""
    table = tuple(mappings)
    return [
        _stage(table, model_config, plan, stage, adapter_rank) for stage in range(plan.layout.pp)
    ]


def estimate(
    mappings: Iterable[ParamMapping], model_config: Any, plan: Plan, *, adapter_rank: int = 0
) -> Memory:
    """The memory of the fullest GPU.

    Args:
        rows: the model's table.
        facts: of the same model.
        plan: how it is spread.
        adapter_rank: of LoRA, with everything else frozen; 0: every parameter is trained.
    """
    return max(
        stages(mappings, model_config, plan, adapter_rank=adapter_rank),
        key=lambda memory: memory.total,
    )


def _stage(
    mappings: tuple[ParamMapping, ...], model_config: Any, plan: Plan, stage: int, adapter_rank: int
) -> Memory:
    held = _count(mappings, model_config, plan, stage)
    copies = plan.dp * plan.cp
    trained = _Held(_adapters(model_config, plan, stage, adapter_rank)) if adapter_rank else held
    frozen = (held.dense + held.expert) if adapter_rank else 0.0
    moe = getattr(model_config, "moe", (False,) * model_config.num_layers)
    qk_norm = any("q_layernorm" in mapping.megatron for mapping in mappings)
    layers = _chunks(model_config.num_layers, plan, stage)
    per_pass = (
        sum(_layer(model_config, plan, moe[layer], qk_norm) for layer in layers) / plan.layout.vpp
    )
    activations = per_pass * _in_flight(plan, stage)
    if plan.recompute:  # the layer that is run again, as it is without recompute
        whole = replace(plan, recompute=False)
        activations += max(_layer(model_config, whole, moe[layer], qk_norm) for layer in layers)
    if stage == plan.layout.pp - 1:
        tokens = plan.seq_length * plan.micro_batch / plan.cp
        activations += (2 + 4 + 2) * tokens * model_config.vocab_size / plan.layout.tp
    count = trained.dense + trained.expert
    return Memory(
        parameters=2 * (frozen + count),
        gradients=4 * count,
        optimizer=12 * (trained.dense / copies + trained.expert / plan.edp),
        activations=activations,
    )
