"""EXAONE 4.0's facts <-> model provider: only what differs from the stock one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec

from exaone_bridge.models.exaone4.config import Exaone4ModelConfig, Llama3Rope
from exaone_bridge.models.exaone4.layer_spec import exaone4_block_spec
from exaone_bridge.modules.provider import ExactGPTModelProvider, common_fields, common_model_config
from exaone_bridge.schema.layer_schedule import megatron_rope, megatron_window

__all__ = ["Exaone4ModelProvider", "exaone4_provider", "model_config_of"]


@dataclass
class Exaone4ModelProvider(ExactGPTModelProvider):
    """GPTModelProvider with what every EXAONE 4.0 has; sizes come from `exaone4_provider`."""

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = exaone4_block_spec
    normalization: str = "RMSNorm"
    activation_func: Callable[[torch.Tensor], torch.Tensor] = F.silu
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    qk_layernorm: bool = True
    position_embedding_type: str = "rope"
    hidden_dropout: float = 0.0
    should_pad_vocab: bool = (
        True  # stock: False, which fails where tp does not divide the vocabulary
    )
    apply_rope_fusion: bool = True  # 8% of a 1.2B step at 8192 (docs/benchmarks.md)
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = (
        False  # no bias, no dropout: a plain add, without torch.compile's guards (4%)
    )


def exaone4_provider(
    model_config: Exaone4ModelConfig, hf_config: Mapping[str, Any]
) -> Exaone4ModelProvider:
    """The provider of these facts; `hf_config` is carried for the export."""
    window_size, window_layers = megatron_window(model_config.windows)
    scaling = {} if model_config.llama3 is None else _scaling(model_config.llama3)
    return Exaone4ModelProvider(
        **common_fields(model_config, hf_config),
        attention_dropout=model_config.attention_dropout,
        window_size=window_size,
        window_attn_skip_freq=window_layers,
        no_rope_freq=megatron_rope(model_config.rope),
        **scaling,
    )


def _scaling(llama3: Llama3Rope) -> dict[str, Any]:
    return {
        "rope_scaling": True,
        "rope_scaling_factor": llama3.factor,
        "rope_scaling_low_freq_factor": llama3.low_freq_factor,
        "rope_scaling_high_freq_factor": llama3.high_freq_factor,
        "rope_scaling_original_max_positions": llama3.original_max_positions,
    }


def model_config_of(provider: Exaone4ModelProvider) -> Exaone4ModelConfig:
    """The inverse of `exaone4_provider`: the facts of the model that this provider would build."""
    layers = provider.num_layers
    slides = provider.window_attn_skip_freq or [int(provider.window_size is not None)] * layers
    window = None if provider.window_size is None else provider.window_size[0] + 1
    return Exaone4ModelConfig(
        **common_model_config(provider),
        attention_dropout=provider.attention_dropout,
        llama3=Llama3Rope(
            factor=provider.rope_scaling_factor,
            low_freq_factor=provider.rope_scaling_low_freq_factor,
            high_freq_factor=provider.rope_scaling_high_freq_factor,
            original_max_positions=provider.rope_scaling_original_max_positions,
        )
        if provider.rope_scaling
        else None,
        windows=tuple(window if slide else None for slide in slides),
        rope=tuple(not none for none in provider.no_rope_freq or [0] * layers),
    )
