"""The provider of MoE models whose router has a selection bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.backend import resolve_backend
from exaone_bridge.modules.provider import ExactGPTModelProvider
from exaone_bridge.schema.layer_schedule import moe_layer_mask_of

__all__ = ["MoEModelProvider"]


@dataclass
class MoEModelProvider(ExactGPTModelProvider):
    """ExactGPTModelProvider with Megatron-Core's mixture of experts.

    Load balancing is off unless a trainer sets it: an auxiliary loss
    (`moe_router_load_balancing_type` and `moe_aux_loss_coeff`), or the update of the selection bias
    after each step (`moe_router_enable_expert_bias` and `moe_router_bias_update_rate`).
    """

    # Auxiliary losses that are supported together with the update of the selection bias.
    LOSSES_BESIDE_BIAS_UPDATE: ClassVar[tuple[str, ...]] = ()

    add_bias_linear: bool = False
    moe_router_enable_expert_bias: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = True
    moe_router_dtype: str | None = "fp32"
    moe_router_load_balancing_type: str | list[str] = "none"
    moe_aux_loss_coeff: float | list[float] = 0.0
    moe_token_dispatcher_type: str = "alltoall"
    moe_grouped_gemm: bool = True
    variable_seq_lengths: bool = False
    moe_permute_fusion: bool = (
        True  # 5% of a step of six layers of ERNIE 21B at 8192 (docs/benchmarks.md)
    )

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether this layer (global, 0-based) is an MoE layer."""
        return moe_layer_mask_of(self.moe_layer_freq, self.num_layers, self.num_moe_experts)[layer]

    def set_published_balancing(self) -> None:
        """Balance experts as the family was trained: here by the selection bias alone.

        The rate is DeepSeek-V3's (2024, section 4.2).
        """
        self.moe_router_enable_expert_bias = True
        self.moe_router_bias_update_rate = 1e-3

    def finalize(self) -> None:
        """Check the load balancing, and override what this machine's backend does not support.

        Raises:
            UnsupportedConfig: two kinds of load balancing at once, or what the base class rejects.
        """
        update_bias = self.moe_router_enable_expert_bias
        if update_bias and self._has_aux_loss(except_for=self.LOSSES_BESIDE_BIAS_UPDATE):
            raise UnsupportedConfig(
                "moe_router_enable_expert_bias",
                got=True,
                wanted=f"off with an auxiliary loss (moe_aux_loss_coeff={self.moe_aux_loss_coeff})",
                where="provider",
                remedy="balance the experts one way or the other",
            )
        has_torch_backend = resolve_backend(self.backend).name == "torch"
        if has_torch_backend:
            # alltoall counts tokens on its own CUDA streams; grouped GEMM needs Transformer Engine.
            self._override(
                moe_token_dispatcher_type="allgather",
                moe_grouped_gemm=False,
                moe_shared_expert_overlap=False,
            )
        # Megatron-Core 0.19.2 rejects the update of a selection bias with softmax, and biases of
        # linears where experts are sharded. Our router supports the first, and our experts have no
        # biases (modules/router.py, modules/moe.py). And it rejects "allgather" with sequences of
        # various lengths, which RL frameworks request; the ranks that gather have sequences of the
        # same lengths without expert parallelism.
        linear_biases, various_lengths = self.add_bias_linear, self.variable_seq_lengths
        self.moe_router_enable_expert_bias = False
        self.add_bias_linear = linear_biases and not self.num_moe_experts
        if has_torch_backend and self.expert_model_parallel_size == 1:
            self.variable_seq_lengths = False
        try:
            super().finalize()
        finally:
            self.moe_router_enable_expert_bias, self.add_bias_linear = update_bias, linear_biases
            self.variable_seq_lengths = various_lengths

    def _has_aux_loss(self, except_for: tuple[str, ...]) -> bool:
        kinds, coefficients = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        kinds = kinds if isinstance(kinds, list) else [kinds]
        coefficients = (
            coefficients if isinstance(coefficients, list) else [coefficients] * len(kinds)
        )
        return any(
            kind not in ("none", *except_for) and coeff
            for kind, coeff in zip(kinds, coefficients, strict=True)
        )
