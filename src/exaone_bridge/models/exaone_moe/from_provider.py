"""EXAONE MoE's model provider -> model config. No torch."""

from __future__ import annotations

from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone_moe.config import (
    ExaoneMoeModelConfig,
    ExaoneMoeMTPConfig,
    RoutedExpertsConfig,
)
from exaone_bridge.schema.layer_schedule import moe_layer_mask_of, rope_of, windows_of_megatron
from exaone_bridge.schema.model_config import model_config_fields

__all__ = ["model_config_of"]


def model_config_of(provider: Any) -> ExaoneMoeModelConfig:
    """Return the config of the model that this provider builds; inverse of `exaone_moe_provider`.

    Raises:
        UnsupportedConfig: RoPE on other layers than those with a sliding window.
    """
    layers = provider.num_layers
    windows = windows_of_megatron(provider.window_size, provider.window_attn_skip_freq, layers)
    if provider.layer_windows:
        windows = tuple(window or None for window in provider.layer_windows)
    rope = rope_of(provider.no_rope_freq, layers)
    if rope != tuple(window is not None for window in windows):
        raise UnsupportedConfig(
            "no_rope_freq",
            got=rope,
            wanted="RoPE on the sliding-window layers, and on no other",
            where="provider",
        )
    shared_size = provider.moe_shared_expert_intermediate_size or 0
    prediction = ExaoneMoeMTPConfig(
        **ExaoneMoeMTPConfig.values_from_provider(provider) | {"shared": True},
        window=provider.mtp_window,
    )
    return ExaoneMoeModelConfig(
        **model_config_fields(ExaoneMoeModelConfig, provider),
        windows=windows,
        swiglu_limits=tuple(
            provider.swiglu_limits or [provider.activation_func_clamp_value or 0.0] * layers
        ),
        moe=RoutedExpertsConfig(
            **RoutedExpertsConfig.values_from_provider(provider),
            layer_mask=moe_layer_mask_of(provider.moe_layer_freq, layers, provider.num_moe_experts),
            num_shared_experts=shared_size // provider.moe_ffn_hidden_size,
        ),
        mtp=prediction if provider.mtp_depth else None,
    )
