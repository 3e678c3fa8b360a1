"""Routers with a bias that only selects experts; a family states the arithmetic.

Megatron-Core 0.19.2's TransformerConfig rejects softmax with an expert bias, and its sigmoid router
always divides the weights by their sum (never those of top-1), and scores groups of experts
otherwise than Transformers does (`moe/moe_utils.py`).

Axes: S sequence, B batch, T = S * B tokens, H hidden, E experts, K experts chosen per token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.errors import UnsupportedConfig

__all__ = ["SelectionBiasRouter", "stays_fp32"]


def stays_fp32(parameter: torch.Tensor) -> bool:
    """Return whether a parameter [...] is the weight of a SelectionBiasRouter."""
    return getattr(parameter, "stays_fp32", False)


class SelectionBiasRouter(TopKRouter):
    """TopKRouter with a family's own `choose`; weight and selection bias stay fp32.

    The selection bias is always there, as the buffer `expert_bias`; Megatron-Core updates it after
    each step (auxiliary-loss-free balancing) only with `moe_router_enable_expert_bias`.

    Raises:
        UnsupportedConfig: the config sets a feature of TopKRouter that would choose other experts.
    """

    score_function: ClassVar[str]  # Megatron-Core's name, which its auxiliary losses need
    _keep_in_float32_parameter_names = ("weight",)

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of each token.

        Args:
            logits_TE: [T, E] fp32.

        Returns:
            Weights [T, K] fp32 and experts [T, K] int64.
        """
        raise NotImplementedError

    def top_k(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """Return the experts [T, K] with the highest scores [T, E], or those that are replayed."""

        # Megatron-Core passes groups, by position where nothing is recorded or replayed and by name
        # where it records (moe/router_replay.py, 0.19.2); the scores already have none.
        def best(
            scores: torch.Tensor, k: int, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            values, indices = torch.topk(scores, k, dim=-1)
            return values, indices

        if self.router_replay is None:
            return best(scores_TE, self.topk)[1]
        experts: torch.Tensor = self.router_replay.get_replay_topk(
            scores_TE, self.topk, default_compute_topk=best
        )[1]
        return experts

    def __init__(self, config: TransformerConfig, **kwargs: object) -> None:
        super().__init__(config=config, **kwargs)
        required = _REQUIRED_FIELDS | {"moe_router_score_function": self.score_function}
        for field, wanted in required.items():
            if (got := getattr(config, field, wanted)) not in (wanted, None, False):
                raise UnsupportedConfig(field, got=got, known=(wanted,), where="provider")
        # Megatron-Bridge 0.6.2 looks for this attribute on the instance
        # (`models/model_provider.py`, `_apply_mixed_precision_wrapper`).
        self._keep_in_float32_parameter_names = ("weight",)
        self.weight.stays_fp32 = True
        if not self.enable_expert_bias:
            device = torch.cuda.current_device()
            for name, persistent in (("local_tokens_per_expert", False), ("expert_bias", True)):
                delattr(self, name)  # the parent sets None if the bias is not updated
                zeros = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=device)
                self.register_buffer(name, zeros, persistent=persistent)

    def reset_parameters(self) -> None:
        """Initialise the weight [E, H] in fp32; the parent would cast it to the model's dtype."""
        if self.config.perform_initialization:
            self.config.init_method(self.weight)
        self.weight.sequence_parallel = self.config.sequence_parallel

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Compute the logits in fp32.

        The parent uses Transformer Engine's GEMM where that is installed, which does not support
        bf16 inputs with an fp32 weight.

        Args:
            input: hidden states [S, B, H], of any dtype.

        Returns:
            [S, B, E] fp32.
        """
        if self.weight.device != input.device:  # like the parent: the weight is made on the CPU
            self.weight.data = self.weight.data.to(input.device)
        return torch.nn.functional.linear(input.float(), self.weight.float(), self.bias)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of each token, and their weights.

        Args:
            logits: [S, B, E] fp32.
            padding_mask: [B, S] bool or of another shape with T elements, True for padding.

        Returns:
            Weights [T, E], zero for experts that are not chosen; and the choice, [T, E] bool.
        """
        length, batch, experts = logits.shape
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits.view(-1, experts), padding_mask=padding)
        weights_TK, experts_TK = self.choose(logits_TE)
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
        if self.enable_expert_bias and torch.is_grad_enabled():
            with torch.no_grad():  # as the parent's `_apply_expert_bias`, without torch.compile
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
        """Attach TopKRouter's auxiliary losses, on scores without bias, as its `routing` does.

        Args:
            weights: [T, E].
            logits: [T, E].
            length: S.
            batch: B.
            padding: [T] bool.

        Returns:
            The weights [T, E].
        """
        choice, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=padding
        )
        masked = {"with_padding_mask": padding is not None}
        weights = self._apply_aux_loss(weights, scores, choice, **masked)
        weights = self._apply_seq_aux_loss(weights, scores, choice, length, batch, **masked)
        return self._apply_global_aux_loss(weights, scores, choice, **masked)


_REQUIRED_FIELDS = {
    "moe_router_fusion": False,
    "moe_router_num_groups": None,
}
