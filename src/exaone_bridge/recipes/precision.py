"""Training in FP8: which sizes its matrix products take. No torch.

FP8 products are those of attention's and the MLPs' linears, experts included (Transformer Engine).
Everything else stays as it is in bf16 training: attention itself, QK norm and RoPE, norms, SwiGLU,
the fp32 router, embedding, output layer, vision encoder, adapters, and the weights that are stored,
loaded and exported. Routed experts run in Transformer Engine's grouped linear in place of
`grouped_mm`, and their token counts are read on the CPU.
"""

from __future__ import annotations

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.recipes.training_plan import TrainingPlan
from exaone_bridge.schema.model_config import ModelConfig

__all__ = ["MIXED_PRECISION", "check_sizes"]

# The names of Megatron-Bridge 0.6.2 (`training/mixed_precision.py`). With current scaling the first
# and the last layer stay in bf16; subchannel scaling is blockwise.
MIXED_PRECISION = {
    "bf16": "bf16_mixed",
    "fp8": "bf16_with_fp8_current_scaling_mixed",
    "fp8-blockwise": "bf16_with_fp8_subchannel_scaling_mixed",
}
_MULTIPLE = 16  # of both sizes of a matrix (Transformer Engine, `assert_dim_for_fp8_exec`; cuBLAS)


def check_sizes(model_config: ModelConfig, plan: TrainingPlan) -> None:
    """Check that a rank's matrices have sizes that FP8 products take.

    Raises:
        UnsupportedLayout: a size is not a multiple of 16.
    """
    if plan.precision == "bf16":
        return
    dims, tp = model_config.dims, plan.layout.tp
    # With more TP ranks than KV heads each rank has a whole one.
    kv = max(dims["K"] // tp, model_config.head_dim)
    sizes = {
        "seq_length x micro_batch_size / cp": plan.seq_length * plan.micro_batch_size // plan.cp,
        "hidden_size": dims["H"],
        "heads / tp x head_dim": dims["Q"] // tp,
        "the QKV projection of a TP rank": dims["Q"] // tp + 2 * kv,
    }
    if not all(model_config.moe_layer_mask):
        sizes["intermediate_size / tp"] = dims["F"] // tp
    if model_config.moe is not None:
        sizes["moe_intermediate_size / etp"] = dims["M"] // plan.layout.expert_tp
        sizes["the size of shared experts / tp"] = dims["A"] // tp
    for name, size in sizes.items():
        if size % _MULTIPLE:
            raise UnsupportedLayout(
                name,
                got=size,
                wanted=f"a multiple of {_MULTIPLE} for FP8",
                remedy="change tp or seq_length, or train in bf16",
            )
