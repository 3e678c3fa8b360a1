"""EXAONE MoE's router: sigmoid in fp32, with a bias that only selects, and groups of experts.

Axes: T tokens, E experts, K experts chosen, G groups.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.modules.router import SelectionBiasRouter

__all__ = ["ExaoneMoeRouter", "scores_of_best_groups"]


def scores_of_best_groups(scores_TE: torch.Tensor, groups: int, topk: int) -> torch.Tensor:
    """Set the scores of experts outside a token's best groups to -inf.

    A group's score is the sum of its two best experts' (ExaoneMoeSparseMoEBlock.
    route_tokens_to_experts, transformers 5.12.1; Megatron-Core sums others).

    Args:
        scores_TE: [T, E], the biased scores.
        groups: G, a divisor of E.
        topk: how many groups a token keeps.

    Returns:
        [T, E].
    """
    if groups == topk:
        return scores_TE
    grouped_TGE = scores_TE.view(len(scores_TE), groups, -1)
    group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_scores_TG.topk(topk, dim=-1).indices, True)
    return grouped_TGE.masked_fill(~kept_TG[..., None], float("-inf")).view_as(scores_TE)


class ExaoneMoeRouter(SelectionBiasRouter):
    """The sigmoid router: experts by biased score, weights from the unbiased scores.

    The config's `norm_topk_prob`, `router_groups`, `router_group_topk` and
    `moe_router_topk_scaling_factor` are the model's.

    Raises:
        UnsupportedConfig: a feature of TopKRouter that would choose other experts.
    """

    score_function = "sigmoid"

    def __init__(self, config: TransformerConfig, **kwargs: object) -> None:
        super().__init__(config=config, **kwargs)
        self.groups, self.group_topk = config.router_groups, config.router_group_topk
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling_factor = config.moe_router_topk_scaling_factor

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts: [T, E] fp32 -> weights [T, K] fp32, experts [T, K] int64.

        sigmoid -> + bias to choose -> gather unbiased -> / (sum + 1e-20) -> x scaling factor
        (ExaoneMoeSparseMoEBlock.route_tokens_to_experts, transformers 5.12.1).
        """
        scores_TE = torch.sigmoid(logits_TE.float())
        biased_TE = scores_TE.detach() + self.expert_bias
        experts_TK = self.top_k(scores_of_best_groups(biased_TE, self.groups, self.group_topk))
        weights_TK = scores_TE.gather(-1, experts_TK)
        if self.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK * self.scaling_factor, experts_TK
