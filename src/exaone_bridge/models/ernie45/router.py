"""A softmax router whose bias only selects; Megatron-Core's config refuses softmax with a selection bias.

Axes: T tokens, E experts, K experts chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.errors import UnsupportedConfig

__all__ = ["SelectionBiasRouter", "choose_experts"]


def choose_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor, topk: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] fp32 and experts [T, K] int64, of logits [T, E] and a selection bias [E].

    softmax -> + bias to choose -> gather unbiased -> renormalise (Ernie4_5_MoeTopKRouter.forward), all in fp32.
    """
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    experts_TK = torch.topk(probabilities_TE.detach() + bias_E, topk, dim=-1).indices
    chosen_TK = probabilities_TE.gather(-1, experts_TK)
    return chosen_TK / chosen_TK.sum(dim=-1, keepdim=True).clamp(min=norm_min), experts_TK


class SelectionBiasRouter(TopKRouter):
    """TopKRouter with `choose_experts` for its arithmetic; weight and selection bias stay fp32.

    The config's `moe_norm_min` is the least sum that weights are divided by. The selection bias is always there, as
    the buffer `expert_bias`; Megatron-Core updates it after each step (aux-loss-free balancing) only where
    `moe_router_enable_expert_bias` is set.

    Raises:
        UnsupportedConfig: a feature of TopKRouter that would choose other experts.
    """

    _keep_in_float32_parameter_names = ("weight",)

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        for field, wanted in _REFUSED.items():
            if (got := getattr(config, field, wanted)) not in (wanted, None, False):
                raise UnsupportedConfig(field, got=got, known=(wanted,), where="provider")
        # Megatron-Bridge looks for the mark on the instance (models/model_provider.py, _apply_mixed_precision_wrapper).
        self._keep_in_float32_parameter_names = ("weight",)
        self.norm_min = config.moe_norm_min
        if not self.enable_expert_bias:
            device = torch.cuda.current_device()
            for name, persistent in (("local_tokens_per_expert", False), ("expert_bias", True)):
                delattr(self, name)  # None, where the bias is not updated
                zeros = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=device)
                self.register_buffer(name, zeros, persistent=persistent)

    def reset_parameters(self) -> None:
        """Initialise, in fp32 whatever the model's type: the parent would cast the weight to it."""
        if self.config.perform_initialization:
            self.config.init_method(self.weight)
        self.weight.sequence_parallel = self.config.sequence_parallel

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, E] fp32 of hidden states [S, B, H], in full fp32 whatever their type.

        The parent's goes through Transformer Engine's GEMM where it is installed, which takes no bf16 input with an
        fp32 weight.
        """
        if self.weight.device != input.device:  # as the parent: Megatron-Core makes it on the CPU
            self.weight.data = self.weight.data.to(input.device)
        return torch.nn.functional.linear(input.float(), self.weight.float(), self.bias)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choice of each token.

        Args:
            logits: [S, B, E] fp32.
            padding_mask: bool, True for tokens that do not count, T of them.

        Returns:
            [T, E] weights, zero where not chosen; [T, E] bool, True where chosen.
        """
        length, batch, experts = logits.shape
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.view(-1, experts), padding_mask=padding)
        weights_TK, experts_TK = choose_experts(
            logits_TE, self.expert_bias, self.topk, self.norm_min
        )
        weights_TE = torch.zeros_like(logits_TE).scatter(
            1, experts_TK, weights_TK.type_as(logits_TE)
        )
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, experts_TK, True)
        if self.config.moe_expert_capacity_factor is not None:
            weights_TE, chosen_TE = apply_router_token_dropping(
                weights_TE,
                chosen_TE,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            weights_TE = self._with_aux_losses(weights_TE, logits_TE, length, batch, padding)
        if (
            self.enable_expert_bias and torch.is_grad_enabled()
        ):  # `_apply_expert_bias`, less torch.compile
            with torch.no_grad():
                counted = chosen_TE if padding is None else chosen_TE & ~padding[:, None]
                self.local_tokens_per_expert += counted.sum(dim=0)
        return weights_TE, chosen_TE

    def _with_aux_losses(
        self,
        weights: torch.Tensor,
        logits: torch.Tensor,
        length: int,
        batch: int,
        padding: torch.Tensor | None,
    ) -> torch.Tensor:
        """TopKRouter's own, on unbiased probabilities, as in its `routing`."""
        choice, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, "softmax", padding_mask=padding
        )
        masked = {"with_padding_mask": padding is not None}
        weights = self._apply_aux_loss(weights, scores, choice, **masked)
        weights = self._apply_seq_aux_loss(weights, scores, choice, length, batch, **masked)
        return self._apply_global_aux_loss(weights, scores, choice, **masked)


_REFUSED = {
    "moe_router_score_function": "softmax",
    "moe_router_fusion": False,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_enable_routing_replay": False,
}
