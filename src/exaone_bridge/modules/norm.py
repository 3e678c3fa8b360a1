"""RMSNorm, for both backends.

Megatron-Core's own wrapper of torch's, `WrappedTorchNorm`, refuses sequence parallelism because it does not mark its
weight: there each rank normalises its cut of the sequence and the weight's gradient must be summed over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["FusedRMSNorm", "TorchRMSNorm"]


class TorchRMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with Megatron-Core's constructor: x [..., H] -> [..., H], weight [H].

    Like Megatron-Core's own local linears it has an empty extra state, because Transformer Engine's norms look for one
    in a checkpoint.

    Raises:
        ValueError: a normalisation other than plain RMSNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError(
                f"TorchRMSNorm: normalization is {config.normalization!r}, and must be plain 'RMSNorm'."
            )
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = (
            config.sequence_parallel
        )  # finalize_model_grads sums over tp where set
        self._register_load_state_dict_pre_hook(
            lambda state_dict, prefix, *_: state_dict.setdefault(f"{prefix}_extra_state")
        )

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: object) -> None: ...


if HAVE_TE:
    import transformer_engine_torch as kernels
    from transformer_engine.pytorch.constants import TE_DType

    class _TransformerEngineRMSNorm(torch.autograd.Function):
        """Transformer Engine's kernels without its operation fuser, which costs 50 us of CPU a call."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            rows = x.reshape(
                -1, x.shape[-1]
            ).contiguous()  # keys are a view into the fused projection
            normed, _, inverse_rms = kernels.rmsnorm_fwd(
                rows, weight, eps, None, None, TE_DType[x.dtype], 0, False
            )
            ctx.save_for_backward(rows, weight, inverse_rms)
            return normed.view(x.shape)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
            rows, weight, inverse_rms = ctx.saved_tensors
            of_rows, of_weight = kernels.rmsnorm_bwd(
                gradient.reshape(rows.shape).contiguous(), rows, inverse_rms, weight, 0, False
            )
            return of_rows.view(gradient.shape), of_weight, None

    class FusedRMSNorm(TorchRMSNorm):
        """`TorchRMSNorm` on the GPU: the faster of torch's kernel and Transformer Engine's for this width.

        On an H200, forward and backward of 16384 x 5120: 455 us with torch's, 575 us with Transformer Engine's; of
        655360 rows of 128: 943 us and 350 us (docs/benchmarks.md).
        """

        _NARROW = 1024  # torch gives each row a block of threads

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.weight.shape[0] >= self._NARROW or not x.is_cuda:
                return super().forward(x)
            return _TransformerEngineRMSNorm.apply(x, self.weight, self.eps)

else:
    FusedRMSNorm = None  # type: ignore[assignment, misc]
