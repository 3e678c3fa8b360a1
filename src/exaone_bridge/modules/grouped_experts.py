"""Routed experts as one grouped matrix product, with token counts that stay on the GPU.

On Hopper, Transformer Engine's grouped linear multiplies expert by expert, with three launches per
expert and linear, each too small to fill the GPU. It also needs the token counts on the CPU, which
waits for the router at every layer. Torch's `grouped_mm` (`torch.nn.functional`, CUTLASS) reads the
counts on the GPU. Parameters, their names and checkpoints stay Transformer Engine's, and so does
the computation where `grouped_mm` does not support it (FP8, fp32, biases, adapters on experts).

Axes: T tokens dispatched to this rank, sorted by expert, E local experts, H hidden, I input
features, O output features.
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
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "AlltoAllTokenDispatcher",
    "ColumnParallelGroupedLinear",
    "GroupedExperts",
    "RowParallelGroupedLinear",
    "grouped_linear",
    "is_swiglu",
    "stack_weights",
]


def is_swiglu(config: TransformerConfig) -> bool:
    """Return whether the MLP's activation is SwiGLU, clamped or not, without an offset."""
    is_glu = config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    return bool(is_glu and not config.glu_linear_offset)


def stack_weights(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack the experts' weights: E times [O, I] -> [E, O, I].

    Returns:
        A view if the weights follow one another in one storage, otherwise a copy.
    """
    first, (rows, columns) = weights[0], weights[0].shape
    nbytes, start = first.numel() * first.element_size(), first.data_ptr()
    storage = first.untyped_storage()
    fits = start - storage.data_ptr() + len(weights) * nbytes <= storage.nbytes()
    if fits and all(
        weight.data_ptr() == start + index * nbytes for index, weight in enumerate(weights)
    ):
        return first.as_strided((len(weights), rows, columns), (rows * columns, columns, 1))
    return torch.stack(tuple(weights))


class _GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, ends: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, ends, *weights)
        return torch.nn.functional.grouped_mm(x, stack_weights(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ends, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x: torch.Tensor | None = None
        grad_weights: Sequence[torch.Tensor | None] = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.functional.grouped_mm(grad, stack_weights(weights), offs=ends)
        if any(ctx.needs_input_grad[2:]):
            grad_weights = torch.nn.functional.grouped_mm(grad.t(), x, offs=ends).unbind()
        return grad_x, None, *grad_weights


def grouped_linear(
    x: torch.Tensor, ends: torch.Tensor, weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Multiply each expert's tokens by its weight, differentiable in `x` and `weights`.

    Args:
        x: [T, I] bf16, sorted by expert.
        ends: [E] int32 on the device of `x`, the end of each expert's tokens in `x`; the last is T.
        weights: E times [O, I] bf16; I and O are multiples of 8.

    Returns:
        [T, O].
    """
    result: torch.Tensor = _GroupedLinearFunction.apply(x.contiguous(), ends, *weights)
    return result


@dataclass(frozen=True, slots=True)
class _GroupEnds:
    """The end of each expert's tokens, [E] int32 on the GPU.

    TEGroupedMLP calls `tolist` on token counts, which must not move these to the CPU.
    """

    values: torch.Tensor

    def tolist(self) -> _GroupEnds:
        return self


class _GroupedMMLinear:
    """Mixin for Transformer Engine's grouped linears: `grouped_mm` where it is supported."""

    def __init__(self, num_gemms: int, *args: object, **kwargs: object) -> None:
        super().__init__(num_gemms, *args, **kwargs)  # type: ignore[call-arg]
        if not self.supports_grouped_mm:
            return
        weights = self._weights()
        with torch.no_grad():
            for weight, view in zip(weights, torch.stack(weights), strict=True):
                weight.data = view
        # Megatron-Core fills its parameter buffers from the last parameter to the first: registered
        # in reverse, the experts' weights follow one another there too.
        parameters: dict[str, torch.nn.Parameter | None]
        parameters = self._parameters  # type: ignore[attr-defined]
        for index in reversed(range(num_gemms)):
            parameters[f"weight{index}"] = parameters.pop(f"weight{index}")

    def _weights(self) -> list[torch.Tensor]:
        return [getattr(self, f"weight{index}") for index in range(self.num_gemms)]  # type: ignore[attr-defined]

    @property
    def supports_grouped_mm(self) -> bool:
        """Whether it has plain bf16 weights on Hopper or later, no bias and no delayed wgrad."""
        if self.use_bias or self.delay_wgrad_compute:  # type: ignore[attr-defined]
            return False
        if getattr(self, "single_grouped_weight", False):
            return False
        weight = self.weight0  # type: ignore[attr-defined]
        is_plain = (
            type(weight.data) is torch.Tensor and weight.is_cuda and weight.dtype is torch.bfloat16
        )
        return (
            is_plain
            and weight.shape[0] % 8 == weight.shape[1] % 8 == 0
            and torch.cuda.get_device_capability() >= (9, 0)
        )

    def forward(self, x: torch.Tensor, splits: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Multiply each expert's tokens by its weight.

        Args:
            x: [T, I], sorted by expert.
            splits: `_GroupEnds`, or what Transformer Engine's grouped linear takes.

        Returns:
            [T, O], and the bias if it is not added yet.
        """
        if isinstance(splits, _GroupEnds):
            return grouped_linear(x, splits.values, self._weights()), None
        result: tuple[torch.Tensor, torch.Tensor | None]
        result = super().forward(x, splits)  # type: ignore[misc]
        return result


if HAVE_TE:  # Triton comes with it
    from exaone_bridge.modules.kernels.swiglu import swiglu

    class ColumnParallelGroupedLinear(_GroupedMMLinear, TEColumnParallelGroupedLinear):
        """The first linear of all local experts."""

    class RowParallelGroupedLinear(_GroupedMMLinear, TERowParallelGroupedLinear):
        """The second linear of all local experts."""

else:
    ColumnParallelGroupedLinear = RowParallelGroupedLinear = None  # type: ignore[assignment, misc]


class GroupedExperts(TEGroupedMLP):
    """TEGroupedMLP that leaves the token counts on the GPU where its linears support that."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *args: object, **kwargs: object
    ) -> None:
        if config.use_te_activation_func:
            # The activation function module does not multiply by the routing probabilities; the
            # parent's fused bias and activation does.
            config = copy.copy(config)
            config.use_te_activation_func = False
            # Its fused SwiGLU drops a clamp (experts.py, 0.19.2); its plain torch code does not.
            config.bias_activation_fusion = not config.activation_func_clamp_value
        super().__init__(num_local_experts, config, *args, **kwargs)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        **buffers: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply each local expert to its tokens.

        Args:
            permuted_local_hidden_states: [T, H], sorted by local expert.
            tokens_per_expert: [E] counts.
            permuted_probs: [T] routing probabilities.
            buffers: optional output buffers of TEGroupedMLP.

        Returns:
            [T, H], and the bias if it is not added yet.
        """
        hidden, counts = permuted_local_hidden_states, tokens_per_expert
        use_grouped_mm = self._supports_grouped_mm(hidden) and counts.is_cuda
        splits: torch.Tensor | _GroupEnds = counts
        if use_grouped_mm:
            splits = _GroupEnds(counts.cumsum(0, dtype=torch.int32))
        if buffers or not (use_grouped_mm and self._is_plain_swiglu()):
            result: tuple[torch.Tensor, torch.Tensor | None]
            result = super().forward(hidden, splits, permuted_probs, **buffers)
            return result
        hidden, _ = self.linear_fc1(hidden, splits)
        limit = self.config.activation_func_clamp_value
        hidden, _ = self.linear_fc2(swiglu(hidden, permuted_probs, limit), splits)
        return hidden, None

    def _supports_grouped_mm(self, hidden: torch.Tensor) -> bool:
        is_bf16 = hidden.dtype is torch.bfloat16 and not (self.config.fp8 or self.config.fp4)
        # A linear that is wrapped by an adapter needs a list of counts.
        linears = (self.linear_fc1, self.linear_fc2)
        return (
            is_bf16
            and hidden.shape[0] > 0
            and all(
                isinstance(linear, _GroupedMMLinear) and linear.supports_grouped_mm
                for linear in linears
            )
        )

    def _is_plain_swiglu(self) -> bool:
        """Return whether only SwiGLU is between the linears: no offloading and no recomputation."""
        extra = self.activation_recompute or self.offload_expert_fc1 or self.offload_moe_act
        other = self.config.moe_mlp_glu_interleave_size or self.config.moe_apply_probs_on_input
        return is_swiglu(self.config) and not (extra or other)


class AlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """MoEAlltoAllTokenDispatcher that keeps the experts' token counts on the GPU.

    Without expert parallelism nothing else needs to be on the CPU, so the CPU never waits for the
    GPU; and tokens from a single rank are sorted already.
    """

    @staticmethod
    def can_replace(dispatcher: MoETokenDispatcher) -> bool:
        """Return whether `dispatcher` is all-to-all, and drops no tokens.

        With CUDA graphs of layers it is not replaced: they capture parts of Megatron-Core's.
        """
        return (
            type(dispatcher) is MoEAlltoAllTokenDispatcher
            and not dispatcher.drop_and_pad
            and dispatcher.config.cuda_graph_impl in ("none", "full_iteration")
        )

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if self.ep_size == self.tp_size == 1:
            self.num_local_experts = 1  # the number of chunks that the parent sorts

    def _maybe_update_cuda_sync_point(self, point: str) -> None:
        if point != "before_finish":  # the sync point of the counts
            super()._maybe_update_cuda_sync_point(point)

    def _maybe_dtoh_and_synchronize(
        self, point: str, tokens_per_expert: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        # One CUDA graph of a full iteration cannot wait for a copy to the CPU. Without expert
        # parallelism there are no splits to copy, and the number of outputs is an int already.
        none_to_copy = self.ep_size == self.tp_size == 1 and isinstance(self.num_out_tokens, int)
        if not (none_to_copy and self.config.cuda_graph_impl == "full_iteration"):
            super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert
