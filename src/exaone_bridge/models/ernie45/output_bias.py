"""A bias on the output layer, which Megatron-Core 0.19.2's GPTModel builds without one.

Axes: V vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

import torch

__all__ = ["add_output_bias"]


def add_output_bias(model: torch.nn.Module) -> None:
    """Give a GPTModel's output layer a bias of zeros, [V / tp]; other stages are unchanged.

    `ColumnParallelLinear.forward` adds its attribute `bias`, with tied weights too.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return
    config = layer.config
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    zeros = torch.zeros(layer.output_size_per_partition, dtype=config.params_dtype, device=device)
    bias = torch.nn.Parameter(zeros)
    bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1
    bias.allreduce = True
    layer.bias = bias
