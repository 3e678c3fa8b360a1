"""Routed experts as one grouped product each way, whatever their number, with token counts that stay on the GPU.

On Hopper, Transformer Engine's grouped linear multiplies expert by expert: three launches an expert and linear, each
too small to fill the GPU, and it needs the token counts on the CPU, which waits for the router at every layer. Torch's
`grouped_mm` (`torch.nn.functional`, CUTLASS) reads the counts where they are. Parameters, their names and checkpoints
stay Transformer Engine's; what `grouped_mm` does not do (FP8, fp32, biases, adapters on experts) stays its work too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    HAVE_TE,
    TEColumnParallelGroupedLinear,
    TERowParallelGroupedLinear,
)
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "AlltoAllTokenDispatcher",
    "ColumnParallelGroupedLinear",
    "GroupedExperts",
    "RowParallelGroupedLinear",
    "grouped_products",
    "is_swiglu",
    "stacked",
]


def is_swiglu(config: TransformerConfig) -> bool:
    """Whether the feed-forward's activation is what `modules/kernels/swiglu.py` computes: neither clamped nor shifted."""
    silu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    return bool(silu and not (config.activation_func_clamp_value or config.glu_linear_offset))


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """E weights [O, I] as one [E, O, I]: a view where they lie one behind the other in one storage, else a copy."""
    first, (rows, columns) = weights[0], weights[0].shape
    size, start = first.numel() * first.element_size(), first.data_ptr()
    storage = first.untyped_storage()
    fits = start - storage.data_ptr() + len(weights) * size <= storage.nbytes()
    if fits and all(
        weight.data_ptr() == start + index * size for index, weight in enumerate(weights)
    ):
        return first.as_strided((len(weights), rows, columns), (rows * columns, columns, 1))
    return torch.stack(tuple(weights))


class _GroupedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ends: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return torch.nn.functional.grouped_mm(x, stacked(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x: torch.Tensor | None = None
        of_weights: Sequence[torch.Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            of_x = torch.nn.functional.grouped_mm(gradient, stacked(weights), offs=ends)
        if any(ctx.needs_input_grad[2:]):
            of_weights = torch.nn.functional.grouped_mm(gradient.t(), x, offs=ends).unbind()
        return of_x, None, *of_weights


def grouped_products(
    x: torch.Tensor, ends: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Each expert's rows of x times its weight: [T, I] -> [T, O], differentiable in x and the weights.

    Args:
        x: [T, I] in bf16, sorted by expert.
        ends: [E] int32, on x's device: how many of x's rows belong to experts 0 .. e. The last is T.
        weights: E times [O, I] in bf16; I and O are multiples of 8.
    """
    result: torch.Tensor = _GroupedProducts.apply(x.contiguous(), ends, *weights)
    return result


@dataclass(frozen=True, slots=True)
class _Ends:
    """Where each expert's rows end; stays on the GPU, though TEGroupedMLP asks for a list of counts."""

    values: torch.Tensor

    def tolist(self) -> _Ends:
        return self


class _Grouped:
    """Mixin over Transformer Engine's grouped linears: [T, I] and where experts end -> [T, O], None."""

    def __init__(self, num_gemms: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_gemms, *args, **kwargs)  # type: ignore[call-arg]
        weights = self._weights()
        if not self.takes_ends:
            return
        with torch.no_grad():
            for weight, place in zip(weights, torch.stack(weights), strict=True):
                weight.data = place
        # Megatron-Core fills its parameter buffers from the last parameter to the first: registered the other way
        # round, the experts lie one behind the other there too.
        parameters: dict[str, Any] = self._parameters  # type: ignore[attr-defined]
        for index in reversed(range(num_gemms)):
            parameters[f"weight{index}"] = parameters.pop(f"weight{index}")

    def _weights(self) -> list[torch.Tensor]:
        return [getattr(self, f"weight{index}") for index in range(self.num_gemms)]  # type: ignore[attr-defined]

    @property
    def takes_ends(self) -> bool:
        """Whether `grouped_mm` can do it: plain bf16 weights on Hopper or later, no bias, wgrad not delayed."""
        if self.use_bias or self.delay_wgrad_compute:  # type: ignore[attr-defined]
            return False
        if getattr(self, "single_grouped_weight", False):
            return False
        weight = self.weight0  # type: ignore[attr-defined]
        plain = (
            type(weight.data) is torch.Tensor and weight.is_cuda and weight.dtype is torch.bfloat16
        )
        return (
            plain
            and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
            and torch.cuda.get_device_capability() >= (9, 0)
        )

    def forward(self, x: torch.Tensor, splits: Any) -> Any:
        if isinstance(splits, _Ends):
            return grouped_products(x, splits.values, self._weights()), None
        return super().forward(x, splits)  # type: ignore[misc]


if HAVE_TE:  # which brings Triton
    from exaone_bridge.modules.kernels.swiglu import swiglu

    class ColumnParallelGroupedLinear(_Grouped, TEColumnParallelGroupedLinear):
        """Experts' first linears."""

    class RowParallelGroupedLinear(_Grouped, TERowParallelGroupedLinear):
        """Experts' second linears."""

else:
    ColumnParallelGroupedLinear = RowParallelGroupedLinear = None  # type: ignore[assignment, misc]


class GroupedExperts(TEGroupedMLP):
    """TEGroupedMLP that leaves the token counts on the GPU where its linears can use them there."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *args: Any, **kwargs: Any
    ) -> None:
        if config.use_te_activation_func:
            config = copy.copy(
                config
            )  # the parent's fused activation has the probabilities in it, the other has not
            config.bias_activation_fusion, config.use_te_activation_func = True, False
        super().__init__(num_local_experts, config, *args, **kwargs)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        **buffers: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, H] sorted by local expert, [E] counts, [T] probabilities -> [T, H], None."""
        hidden, counts = permuted_local_hidden_states, tokens_per_expert
        grouped = self._grouped(hidden) and counts.is_cuda
        splits: Any = _Ends(counts.cumsum(0, dtype=torch.int32)) if grouped else counts
        if buffers or not (grouped and self._plain()):
            result: tuple[torch.Tensor, torch.Tensor | None]
            result = super().forward(hidden, splits, permuted_probs, **buffers)
            return result
        hidden, _ = self.linear_fc1(hidden, splits)
        hidden, _ = self.linear_fc2(swiglu(hidden, permuted_probs), splits)
        return hidden, None

    def _grouped(self, hidden: torch.Tensor) -> bool:
        plain = (
            hidden.dtype is torch.bfloat16
            and hidden.shape[0] > 0
            and not (self.config.fp8 or self.config.fp4)
        )
        # An adapter around a linear asks for a list.
        linears = (self.linear_fc1, self.linear_fc2)
        return plain and all(
            isinstance(linear, _Grouped) and linear.takes_ends for linear in linears
        )

    def _plain(self) -> bool:
        """Whether there is nothing between the linears but SwiGLU: no offloading, no recompute."""
        between = self.activation_recompute or self.offload_expert_fc1 or self.offload_moe_act
        other = self.config.moe_mlp_glu_interleave_size or self.config.moe_apply_probs_on_input
        return is_swiglu(self.config) and not (between or other)


class AlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """MoEAlltoAllTokenDispatcher that keeps the experts' token counts on the GPU.

    Without expert parallelism nothing else is asked of the GPU, so that the CPU never waits; and tokens that come from
    one rank are in order already.
    """

    @staticmethod
    def suits(dispatcher: Any) -> bool:
        """Whether this class does what `dispatcher` is configured to do: drop nothing, be in no CUDA graph."""
        return (
            type(dispatcher) is MoEAlltoAllTokenDispatcher
            and not dispatcher.drop_and_pad
            and dispatcher.config.cuda_graph_impl == "none"
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.ep_size == self.tp_size == 1:
            self.num_local_experts = 1  # as many chunks as the parent has to sort

    def _maybe_update_cuda_sync_point(self, point: str) -> None:
        if point != "before_finish":  # for the counts alone
            super()._maybe_update_cuda_sync_point(point)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert
