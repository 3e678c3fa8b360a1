"""Checks a training plan against the model and the GPU. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.models import family_of
from exaone_bridge.recipes.cuda_graphs import CudaGraphs, choose_cuda_graphs, has_fixed_shapes
from exaone_bridge.recipes.memory import GB, MemoryEstimate, estimate
from exaone_bridge.recipes.precision import check_sizes
from exaone_bridge.recipes.training_plan import TrainingPlan
from exaone_bridge.recipes.training_plans import ADAPTER_RANK
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.model_family import ModelDescription

__all__ = ["CheckedPlan", "check_plan"]


@dataclass(frozen=True, slots=True)
class CheckedPlan:
    """A training plan that fits the model and the GPU.

    Attributes:
        plan: the plan.
        model: the model to be trained.
        memory: the estimate of the GPU that needs most.
        graphs: the CUDA graphs that the run has.
    """

    plan: TrainingPlan
    model: ModelDescription
    memory: MemoryEstimate
    graphs: CudaGraphs


def check_plan(
    model: str,
    stage: str,
    gpu_memory_gb: int,
    hf_config: JSONMapping,
    plan: TrainingPlan,
    packed: bool = False,
) -> CheckedPlan:
    """Check a plan against the model and the GPU. No torch.

    Args:
        model, stage: the recipe's.
        gpu_memory_gb: of one GPU.
        hf_config: config.json of the model.
        plan: the plan.
        packed: whether samples of fine-tuning are packed.

    Raises:
        UnsupportedLayout: the plan does not fit the model (`TrainingPlan.check`), or the GPU.
    """
    family = family_of(hf_config["architectures"], where=f"recipe {model}")
    description = family.describe(hf_config)
    plan.check(description.config)
    check_sizes(description.config, plan)
    adapter_rank = ADAPTER_RANK if stage == "peft" else 0
    images = "_vl_" in model
    if plan.fuse_weight_gradients and stage == "peft":
        raise UnsupportedLayout(
            "fuse_weight_gradients",
            got=True,
            wanted="off for adapters, whose linears are not Transformer Engine's",
            remedy="leave fuse_weight_gradients out",
        )
    if plan.tp_overlap and not has_fixed_shapes(plan, stage, packed=packed, images=images):
        raise UnsupportedLayout(
            "tp_overlap",
            got=True,
            wanted="off where the lengths of microbatches vary, because its buffers have one size",
            remedy="set pad_samples=True or packed=True, or leave tp_overlap out",
        )
    graphs = choose_cuda_graphs(description.config, plan, stage, packed=packed, images=images)
    memory = estimate(description, plan, adapter_rank=adapter_rank, graphs=graphs)
    if (needed := memory.total / GB) > gpu_memory_gb:
        raise UnsupportedLayout(
            "memory of a GPU",
            got=f"{gpu_memory_gb} GB",
            wanted=f"at least the {needed:.0f} GB that this plan is estimated to need",
            remedy="shard the model further (tp, pp, ep), lower seq_length, or set recompute=True",
        )
    return CheckedPlan(plan, description, memory, graphs)
