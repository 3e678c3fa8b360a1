"""A bias on the output layer, which Megatron-Core's GPTModel builds without one."""

from __future__ import annotations

import torch

__all__ = ["add_output_bias"]


def add_output_bias(model: torch.nn.Module) -> None:
    """Give a GPTModel's output layer a bias of zeros, [V / tp]; nothing happens where this rank has no output layer.

    Its class adds a `bias` that it has (`ColumnParallelLinear.forward`), tied weights or not.
    """
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return
    here, config = layer.output_size_per_partition, layer.config
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    bias = torch.nn.Parameter(torch.zeros(here, dtype=config.params_dtype, device=device))
    bias.tensor_model_parallel, bias.partition_dim, bias.partition_stride = True, 0, 1
    bias.allreduce = True
    layer.bias = bias
