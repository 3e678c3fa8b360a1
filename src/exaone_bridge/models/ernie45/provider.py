"""ERNIE 4.5's facts <-> model provider: only what differs from the stock one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec

from exaone_bridge.models.ernie45.config import Ernie45ModelConfig
from exaone_bridge.models.ernie45.layer_spec import ernie45_block_spec
from exaone_bridge.models.ernie45.moe_provider import MoEModelProvider
from exaone_bridge.models.ernie45.output_bias import add_output_bias
from exaone_bridge.modules.provider import common_fields, common_model_config

__all__ = ["Ernie45ModelProvider", "ernie45_provider", "model_config_of"]


@dataclass
class Ernie45ModelProvider(MoEModelProvider):
    """MoEModelProvider with what every ERNIE 4.5 has; sizes come from `ernie45_provider`.

    Attributes:
        output_bias: whether the output layer has a bias, which Megatron-Core's has not.
        mtp_layers_carried: next-token-prediction layers that the checkpoint ships beside the model.
    """

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = ernie45_block_spec
    normalization: str = "RMSNorm"
    activation_func: Callable[[torch.Tensor], torch.Tensor] = F.silu
    gated_linear_unit: bool = True
    position_embedding_type: str = "rope"
    rotary_interleaved: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0  # Ernie4_5Attention.__init__; stock: 0.1
    should_pad_vocab: bool = (
        True  # stock: False, which fails where tp does not divide the vocabulary
    )
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = (
        False  # as a rule no bias, no dropout: a plain add, without torch.compile's guards
    )
    apply_rope_fusion: bool = True  # Transformer Engine's kernel rotates in fp32 too
    moe_norm_min: float = 1e-12
    output_bias: bool = False
    mtp_layers_passthrough: int = 0

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """The GPTModel of this rank (of its chunk `vp_stage`)."""
        model = super().provide(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if self.output_bias:
            add_output_bias(model)
        return model


def ernie45_provider(
    model_config: Ernie45ModelConfig, hf_config: Mapping[str, Any]
) -> Ernie45ModelProvider:
    """The provider of these facts; `hf_config` is carried for the export."""
    experts: dict[str, Any] = (
        {
            "num_moe_experts": model_config.num_experts,
            "moe_router_topk": model_config.topk,
            "moe_ffn_hidden_size": model_config.expert_ffn_size,
            "moe_shared_expert_intermediate_size": model_config.shared_ffn_size or None,
            "moe_layer_freq": [int(moe) for moe in model_config.moe],
            "moe_norm_min": model_config.norm_min,
        }
        if any(model_config.moe)
        else {}
    )
    return Ernie45ModelProvider(
        **common_fields(model_config, hf_config),
        add_bias_linear=model_config.bias,
        output_bias=model_config.head_bias,
        mtp_layers_passthrough=model_config.mtp_layers,
        **experts,
    )


def model_config_of(provider: Ernie45ModelProvider) -> Ernie45ModelConfig:
    """The inverse of `ernie45_provider`: the facts of the model that this provider would build."""
    moe = tuple(provider.is_moe_layer(layer) for layer in range(provider.num_layers))
    expert_ffn = provider.moe_ffn_hidden_size if any(moe) else 0
    return Ernie45ModelConfig(
        **common_model_config(provider),
        bias=provider.add_bias_linear,
        head_bias=provider.output_bias,
        moe=moe,
        num_experts=provider.num_moe_experts if any(moe) else 0,
        topk=provider.moe_router_topk if any(moe) else 0,
        expert_ffn_size=expert_ffn,
        num_shared_experts=(provider.moe_shared_expert_intermediate_size or 0) // expert_ffn
        if any(moe)
        else 0,
        norm_min=provider.moe_norm_min if any(moe) else 0.0,
        mtp_layers=provider.mtp_layers_passthrough,
    )
