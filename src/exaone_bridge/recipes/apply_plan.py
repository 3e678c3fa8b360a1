"""Sets a training plan on Megatron-Bridge's configuration. Imports Megatron-Bridge when called."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.recipes.cuda_graphs import CudaGraphs
from exaone_bridge.recipes.precision import MIXED_PRECISION
from exaone_bridge.recipes.training_plan import TrainingPlan

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

    from exaone_bridge.modules.provider import ExactGPTModelProvider

__all__ = ["apply_to_config", "apply_to_provider"]

logger = logging.getLogger(__name__)


def apply_to_provider(provider: ExactGPTModelProvider, plan: TrainingPlan) -> None:
    """Set the layout, the sequence length, the recomputation, and what overlaps in the model."""
    import torch
    from megatron.core.transformer.utils import is_layer_window_attention

    for name, value in plan.layout.provider_overrides().items():
        setattr(provider, name, value)
    provider.seq_length = plan.seq_length
    provider.pipeline_dtype = torch.bfloat16
    if plan.recompute:
        provider.recompute_granularity = "full"
        provider.recompute_method = "uniform"
        provider.recompute_num_layers = 1
    if plan.layout.vpp > 1:  # exchanges of activations overlap with the other model chunk
        provider.overlap_p2p_comm, provider.batch_p2p_comm = True, False
    provider.moe_shared_expert_overlap = plan.shared_expert_overlap
    provider.fuse_weight_gradients = plan.fuse_weight_gradients
    if plan.cp_full_attention or plan.cp_sliding_window:
        provider.cp_comm_type = [
            (plan.cp_sliding_window or "all_gather")
            if is_layer_window_attention(
                provider.window_size, provider.window_attn_skip_freq, layer + 1
            )
            else (plan.cp_full_attention or "p2p")
            for layer in range(provider.num_layers)
        ]


def apply_to_config(config: ConfigContainer, plan: TrainingPlan, graphs: CudaGraphs) -> None:
    """Set the environment, the precision, the overlap of communication, and the CUDA graphs.

    Raises:
        UnsupportedConfig: the GPU or the packages of this machine do not support the precision.
    """
    config.env_vars |= plan.environment
    if plan.precision != "bf16":
        _use_fp8(config, plan)
    if plan.tp_overlap:
        _overlap_tp(config)
    _apply_graphs(config, graphs)


def _use_fp8(config: ConfigContainer, plan: TrainingPlan) -> None:
    """Set FP8; where there is a GPU, check that it and Transformer Engine have it.

    Megatron-Core 0.19.2 trains in bf16 without a word where Transformer Engine is not installed
    (`fp8_utils.py`, `get_fp8_context`).
    """
    import torch
    from megatron.bridge.training.config import apply_environment_variables
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    from exaone_bridge.modules.backend import TRANSFORMER_ENGINE

    where, remedy = "recipe", "set precision='bf16'"
    if torch.cuda.is_available():
        apply_environment_variables(config)  # the next line starts CUDA, which reads some of them
        needed = (9, 0) if plan.precision == "fp8-blockwise" else (8, 9)
        if (found := torch.cuda.get_device_capability()) < needed:
            wanted = f"'bf16' on a GPU of compute capability {found}, below {needed}"
            raise UnsupportedConfig(
                "precision", got=plan.precision, wanted=wanted, where=where, remedy=remedy
            )
        if TRANSFORMER_ENGINE is None:
            wanted = "'bf16' without Transformer Engine"
            raise UnsupportedConfig(
                "precision", got=plan.precision, wanted=wanted, where=where, remedy=remedy
            )
    config.mixed_precision = get_mixed_precision_config(MIXED_PRECISION[plan.precision])
    # Weights are stored in bf16, so that loading and exporting them is exact.
    config.mixed_precision.fp8_param_gather = False


def _overlap_tp(config: ConfigContainer) -> None:
    """Overlap tensor-parallel communication; what else the class sets stays as it is.

    Except for the size of gradient buckets, where there are data-parallel ranks.
    """
    from megatron.bridge.training.comm_overlap import CommOverlapConfig

    config.comm_overlap = CommOverlapConfig(
        tp_comm_overlap=True,
        overlap_p2p_comm=config.model.overlap_p2p_comm,
        batch_p2p_comm=config.model.batch_p2p_comm,
        overlap_grad_reduce=config.ddp.overlap_grad_reduce,
        overlap_param_gather=config.ddp.overlap_param_gather,
        align_param_gather=config.ddp.align_param_gather,
    )


def _apply_graphs(config: ConfigContainer, graphs: CudaGraphs) -> None:
    """Set the CUDA graphs, and say in one line of rank 0's log why they are less than requested."""
    import torch

    from exaone_bridge.modules.backend import TRANSFORMER_ENGINE

    if graphs.kind != "off" and TRANSFORMER_ENGINE is None and torch.cuda.is_available():
        graphs = CudaGraphs("off", reason="Transformer Engine is not installed")
    if graphs.reason and os.environ.get("RANK", "0") == "0":
        logger.warning("CUDA graphs: %s", graphs)
    if graphs.kind == "off":
        return
    from megatron.bridge.utils.cuda_graph import (
        set_cuda_graph_modules,
        set_full_iteration_cuda_graph,
    )

    # Replays draw other random numbers only with Transformer Engine's tracker, which has to be
    # there before any random number is drawn.
    config.model.use_te_rng_tracker = config.rng.te_rng_tracker = True
    if graphs.kind == "layers":
        config.model.cuda_graph_impl = "transformer_engine"
        set_cuda_graph_modules(config.model, list(graphs.modules))
        return
    set_full_iteration_cuda_graph(config.model)
    # Both checks read a value on the CPU inside of what is captured. The gradient norm, which is
    # logged at each step, is computed outside of it.
    config.rerun_state_machine.check_for_nan_in_loss = False
    config.ddp.check_for_nan_in_grad = False
