"""ERNIE 4.5's router: softmax, with a bias that only selects experts.

Axes: T tokens, E experts, K experts chosen per token.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.modules.router import SelectionBiasRouter

__all__ = ["Ernie45Router", "choose_experts"]


def choose_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor, topk: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token.

    softmax -> add bias to choose -> gather without bias -> renormalise, all in fp32
    (`Ernie4_5_MoeTopKRouter.forward`, Transformers 5.12.1, `modeling_ernie4_5_moe.py`).

    Args:
        logits_TE: [T, E].
        bias_E: [E], the selection bias.
        topk: K.
        norm_min: the least sum by which weights are divided.

    Returns:
        Weights [T, K] fp32 and experts [T, K] int64.
    """
    probabilities_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    experts_TK = torch.topk(probabilities_TE.detach() + bias_E, topk, dim=-1).indices
    chosen_TK = probabilities_TE.gather(-1, experts_TK)
    return chosen_TK / chosen_TK.sum(dim=-1, keepdim=True).clamp(min=norm_min), experts_TK


class Ernie45Router(SelectionBiasRouter):
    """The softmax router; weights are divided by at least the config's `moe_norm_min`.

    Raises:
        UnsupportedConfig: the config sets a feature of TopKRouter that would choose other experts.
    """

    score_function = "softmax"

    def __init__(self, config: TransformerConfig, **kwargs: object) -> None:
        super().__init__(config=config, **kwargs)
        for field in ("moe_enable_routing_replay", "moe_router_topk_scaling_factor"):
            if got := getattr(config, field):
                raise UnsupportedConfig(field, got=got, known=(None, False), where="provider")
        self.norm_min = config.moe_norm_min

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of each token; see `choose_experts`.

        Args:
            logits_TE: [T, E] fp32.

        Returns:
            Weights [T, K] fp32 and experts [T, K] int64.
        """
        return choose_experts(logits_TE, self.expert_bias, self.topk, self.norm_min)
