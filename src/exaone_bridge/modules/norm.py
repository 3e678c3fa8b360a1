"""RMSNorm of both backends.

Megatron-Core 0.19.2's wrapper of torch's norm, `WrappedTorchNorm` (`transformer/torch_norm.py`),
rejects sequence parallelism, because it does not mark its weight: each TP rank normalises its shard
of the sequence, so the weight's gradient must be summed over TP.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["FusedRMSNorm", "TorchRMSNorm"]


class TorchRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with Megatron-Core's constructor: x [..., H] -> [..., H], weight [H].

    Like Megatron-Core's own linears it has an empty extra state, because Transformer Engine's norms
    expect one in a checkpoint.

    Raises:
        ValueError: the config's normalization is not plain RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"TorchRMSNorm: normalization is {config.normalization!r}, and must be plain "
                "'RMSNorm' (layernorm_zero_centered_gamma=False)."
            )
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        # Megatron-Core sums the gradients of marked parameters over TP (`finalize_model_grads`).
        self.weight.sequence_parallel = config.sequence_parallel
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *_: state_dict.setdefault(f"{prefix}_extra_state")
        )

    def get_extra_state(self) -> None:
        """Return no extra state."""
        return None

    def set_extra_state(self, state: object) -> None:
        """Ignore the extra state of a checkpoint."""


if HAVE_TE:
    import transformer_engine_torch as kernels
    from transformer_engine.pytorch.constants import TE_DType

    class _TransformerEngineRMSNorm(torch.autograd.Function):
        """Transformer Engine's kernels without its operation fuser, which costs 50 us of CPU time.

        x [..., H], weight [H] -> [..., H].
        """

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            # Keys are a view of the fused projection: not contiguous.
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            normed, _, inverse_rms = kernels.rmsnorm_fwd(
                rows, weight, eps, None, None, TE_DType[x.dtype], 0, False
            )
            ctx.save_for_backward(rows, weight, inverse_rms)
            return normed.view(x.shape)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            rows, weight, inverse_rms = ctx.saved_tensors
            grad_rows, grad_weight = kernels.rmsnorm_bwd(
                grad.reshape(rows.shape).contiguous(), rows, inverse_rms, weight, 0, False
            )
            return grad_rows.view(grad.shape), grad_weight, None

    class FusedRMSNorm(TorchRMSNorm):
        """`TorchRMSNorm` with the faster GPU kernel for its width: torch's or Transformer Engine's.

        Forward and backward on an H200: 16384 rows of 5120 take 455 us with torch and 575 us with
        Transformer Engine; 655360 rows of 128 take 943 us and 350 us (docs/benchmarks.md).
        """

        _TORCH_MIN_WIDTH = 1024  # torch uses one block of threads per row

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Normalise x [..., H] -> [..., H]."""
            if self.weight.shape[0] >= self._TORCH_MIN_WIDTH or not x.is_cuda:
                return super().forward(x)
            return _TransformerEngineRMSNorm.apply(x, self.weight, self.eps)

else:
    FusedRMSNorm = None  # type: ignore[assignment, misc]
