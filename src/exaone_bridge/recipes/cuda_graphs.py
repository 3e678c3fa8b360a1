"""Which CUDA graphs a training run can have. No torch.

A graph replays kernels with the shapes and addresses of the capture, and runs no Python. The kinds,
from the least to the most that is captured:

- "layers": Transformer Engine captures each layer once for each microbatch in flight
  (`cuda_graph_impl="transformer_engine"`), whole or in parts.
- "full-iteration": one graph of all forward and backward passes of a step; the optimizer stays
  outside (`cuda_graph_impl="full_iteration"`).

What Megatron-Core 0.19.2 and Megatron-Bridge 0.6.2 reject (`transformer/transformer_config.py`,
`training/config.py`, `ConfigContainer.validate`) is never chosen, and neither is what they accept
and cannot capture:

- Shapes that vary: padding to the longest sample of a batch, and images.
- Packed sequences: a replayed layer takes no `PackedSeqParams` (`TransformerLayer.
  _te_cuda_graph_replay` asserts it), and the longest sequence is read on the CPU. The parts after
  attention can be captured.
- Full recomputation: a layer's graph has no recomputation inside.
- Pipeline stages in a full iteration: `batch_p2p_sync` synchronises each exchange with the CPU.
- A model for images with context parallelism in a full iteration: it reads on the CPU whether a
  batch is sharded already (`models/exaone45/model.py`).
- Experts on several GPUs: all-to-all needs the token counts on the CPU. Router and preprocessing
  can be captured. Without expert parallelism our dispatcher leaves the counts on the GPU
  (`modules/grouped_experts.py`), except for FP8 and for adapters on experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from exaone_bridge.recipes.training_plan import CudaGraphKind, TrainingPlan
from exaone_bridge.schema.model_config import ModelConfig

__all__ = ["CudaGraphs", "choose_cuda_graphs", "has_fixed_shapes"]


@dataclass(frozen=True, slots=True)
class CudaGraphs:
    """The CUDA graphs of a run.

    Attributes:
        kind: what is captured.
        modules: the parts of each layer that are captured, named as Megatron-Core's
            `cuda_graph_modules`; empty: all, or none where `kind` is "off".
        reason: why less is captured than was requested; empty: it is not less.
    """

    kind: CudaGraphKind
    modules: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        parts = f" ({', '.join(self.modules)})" if self.modules else ""
        return self.kind + parts + (f": {self.reason}" if self.reason else "")


def has_fixed_shapes(plan: TrainingPlan, stage: str, *, packed: bool, images: bool) -> bool:
    """Return whether all microbatches have the same number of tokens.

    Pretraining data and packed text have `seq_length` tokens. Other samples are padded to the
    longest of a batch; with `plan.pad_samples` to `seq_length`, and so are samples with images
    where there is pipeline parallelism (Megatron-Bridge 0.6.2, `ConfigContainer.validate`).

    Args:
        plan: the training plan.
        stage: "pretrain", "64k_pretrain", "128k_pretrain", "sft" or "peft".
        packed: whether samples are packed.
        images: whether batches have images.
    """
    if stage.endswith("pretrain"):
        return True
    if packed:
        return not images  # which are packed in a batch, to the width of that batch
    return plan.pad_samples or (images and plan.layout.pp > 1)


def choose_cuda_graphs(
    model_config: ModelConfig, plan: TrainingPlan, stage: str, *, packed: bool, images: bool
) -> CudaGraphs:
    """Choose the most of `plan.cuda_graphs` that this run can have.

    Args:
        model_config: the model to be trained.
        plan, stage, packed, images: see `has_fixed_shapes`.
    """
    if plan.cuda_graphs == "off":
        return CudaGraphs("off")
    if not has_fixed_shapes(plan, stage, packed=packed, images=images):
        varies = "batches with images that are packed" if packed else "samples that are not padded"
        return CudaGraphs("off", reason=f"the lengths of {varies} vary")
    reason = ""
    if plan.cuda_graphs == "full-iteration":
        reason = _why_not_full_iteration(model_config, plan, stage, packed=packed, images=images)
        if not reason:
            return CudaGraphs("full-iteration")
    if plan.recompute:
        why = "layers that are recomputed as a whole cannot be captured one by one"
        return CudaGraphs("off", reason=f"{reason}, and {why}" if reason else why)
    return CudaGraphs("layers", _modules(model_config, packed=packed), reason)


def _why_not_full_iteration(
    model_config: ModelConfig, plan: TrainingPlan, stage: str, *, packed: bool, images: bool
) -> str:
    if packed:
        return "the lengths of packed sequences are read on the CPU"
    if images:
        return "images have sizes of their own"
    if plan.layout.pp > 1:
        return "pipeline stages synchronise with the CPU when they exchange activations"
    if model_config.vision is not None and plan.cp > 1:
        return "the positions of each batch are read on the CPU"
    if model_config.num_experts and (plan.layout.ep > 1 or plan.layout.expert_tp > 1):
        return "all-to-all needs the experts' token counts on the CPU"
    if model_config.num_experts and plan.precision != "bf16":
        return "FP8 products of experts need their token counts on the CPU"
    if model_config.num_experts and stage == "peft":
        return "adapters on experts would need their token counts on the CPU"
    return ""


def _modules(model_config: ModelConfig, *, packed: bool) -> tuple[str, ...]:
    """Return the parts of the layers that can be captured, as `CudaGraphs.modules`."""
    is_moe = model_config.moe_layer_mask
    if not any(is_moe):
        return ("mlp",) if packed else ()
    attention = () if packed else ("attn",)
    mlp = () if all(is_moe) else ("mlp",)  # Megatron-Core rejects it where no layer is dense
    return (*attention, *mlp, "moe_router", "moe_preprocess")
