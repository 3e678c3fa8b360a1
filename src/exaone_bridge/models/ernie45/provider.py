"""ERNIE 4.5's model config <-> model provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec

from exaone_bridge.models.ernie45.config import Ernie45ModelConfig
from exaone_bridge.models.ernie45.layer_spec import ernie45_block_spec
from exaone_bridge.models.ernie45.output_bias import add_output_bias
from exaone_bridge.modules.moe_provider import MoEModelProvider
from exaone_bridge.modules.provider import provider_fields
from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = ["Ernie45ModelProvider", "ernie45_provider"]


@dataclass
class Ernie45ModelProvider(MoEModelProvider):
    """The provider of ERNIE 4.5: defaults of every model here, sizes from `ernie45_provider`.

    Attributes:
        moe_norm_min: the least sum that the weights of a token's experts are divided by.
        output_bias: whether the output layer has a bias, for which Megatron-Core has no option.
        mtp_layers_passthrough: layers of multi-token prediction on disk, which are not built.
    """

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = ernie45_block_spec
    normalization: str = "RMSNorm"
    activation_func: Callable[[torch.Tensor], torch.Tensor] = F.silu
    gated_linear_unit: bool = True
    position_embedding_type: str = "rope"
    rotary_interleaved: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0  # Ernie4_5Attention.__init__; default: 0.1
    should_pad_vocab: bool = (
        True  # default: False, which fails where tp does not divide the vocabulary
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
        """Return the GPTModel of this rank (of its chunk `vp_stage`)."""
        model = super().provide(
            pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if self.output_bias:
            add_output_bias(model)
        return model


def ernie45_provider(
    model_config: Ernie45ModelConfig, hf_config: JSONMapping
) -> Ernie45ModelProvider:
    """Return the provider of this model.

    Args:
        model_config: of the model to be built.
        hf_config: the config.json that it came from, which the provider keeps for the export.
    """
    moe, mtp = model_config.moe, model_config.mtp
    experts: JSONObject = {}
    if moe is not None:
        experts = moe.provider_fields() | {
            "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
            "moe_layer_freq": [int(is_moe) for is_moe in moe.layer_mask],
        }
    return Ernie45ModelProvider(
        **provider_fields(model_config, hf_config),
        mtp_layers_passthrough=0 if mtp is None else mtp.depth,
        **experts,
    )
