"""EXAONE MoE's model config <-> model provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.models.exaone_moe.config import (
    ExaoneMoeModelConfig,
)
from exaone_bridge.models.exaone_moe.layer_spec import exaone_moe_block_spec, exaone_moe_layer_spec
from exaone_bridge.modules.backend import resolve_backend
from exaone_bridge.modules.moe_provider import MoEModelProvider
from exaone_bridge.modules.mtp import mtp_block_spec
from exaone_bridge.modules.provider import provider_fields
from exaone_bridge.schema.json_types import JSONMapping
from exaone_bridge.schema.layer_schedule import megatron_rope, megatron_window

__all__ = ["ExaoneMoeModelProvider", "exaone_moe_provider"]


@dataclass
class ExaoneMoeModelProvider(MoEModelProvider):
    """MoEModelProvider with what every EXAONE MoE has; sizes come from `exaone_moe_provider`.

    Attributes:
        norm_topk_prob, router_groups, router_group_topk: see `RoutedExpertsConfig`.
        router_fp32_on_disk: the exported router weight is fp32 whatever the model's dtype.
        layer_windows: for each layer its window in keys, 0 for full attention, where windows of
            several sizes occur; `window_size` and `window_attn_skip_freq` then tell only which
            layers have one.
        swiglu_limits: for each layer the limit of its SwiGLU's clamp, 0 for none.
        mtp_depth, mtp_steps: of multi-token prediction on disk. It is built and trained where
            `mtp_num_layers` is set (the tokens to predict); else its tensors pass through.
        mtp_window: the window of its layer, in keys; None: full attention without RoPE.
    """

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = exaone_moe_block_spec
    normalization: str = "RMSNorm"
    activation_func: Callable[[torch.Tensor], torch.Tensor] = F.silu
    gated_linear_unit: bool = True
    qk_layernorm: bool = True
    position_embedding_type: str = "rope"
    hidden_dropout: float = 0.0
    should_pad_vocab: bool = True  # stock: False, which fails where tp does not divide it
    bias_activation_fusion: bool = True
    bias_dropout_fusion: bool = False  # no bias, no dropout: a plain add
    apply_rope_fusion: bool = True
    moe_router_score_function: str = "sigmoid"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = 2.5
    norm_topk_prob: bool = True
    router_groups: int = 1
    router_group_topk: int = 1
    router_fp32_on_disk: bool = False
    layer_windows: list[int] | None = None
    swiglu_limits: list[float] | None = None
    mtp_depth: int = 0
    mtp_steps: int = 1
    mtp_window: int | None = None
    mtp_loss_scaling_factor: float | None = 0.05  # arXiv 2601.01739; stock: 0.1

    # The model's own training had the bias update and the sequence-level loss (arXiv 2601.01739).
    LOSSES_BESIDE_BIAS_UPDATE: ClassVar[tuple[str, ...]] = ("seq_aux_loss",)

    def set_published_balancing(self) -> None:
        """Balance experts as arXiv 2601.01739 has it: selection bias and sequence-level loss."""
        self.moe_router_enable_expert_bias = True
        self.moe_router_bias_update_rate = 1e-4
        self.moe_router_load_balancing_type, self.moe_aux_loss_coeff = "seq_aux_loss", 1e-4

    def finalize(self) -> None:
        """Check per-layer lists and multi-token prediction, then what the parent checks.

        Raises:
            UnsupportedConfig: lists of another length than `num_layers`, several layers of
                multi-token prediction to be built, or what the parent rejects.
        """
        for name in ("layer_windows", "swiglu_limits"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_layers:
                raise UnsupportedConfig(
                    name,
                    got=f"{len(values)} entries",
                    wanted=f"one entry for each of num_layers={self.num_layers}",
                    where="provider",
                )
        if self.mtp_num_layers and self.mtp_depth != 1:
            raise UnsupportedConfig(
                "num_nextn_predict_layers",
                got=self.mtp_depth,
                wanted="1 where multi-token prediction is built: the inputs of its layers are one "
                "set of tensors on disk, and Megatron-Core has one for each layer",
                where="provider",
                remedy="leave provider.mtp_num_layers out, and its tensors pass through",
            )
        sizes = {None, *(window or None for window in self.layer_windows or ())}
        if self.window_size is not None:
            sizes.add(self.window_size[0] + 1)
        if self.mtp_num_layers and self.mtp_window not in sizes:
            raise UnsupportedConfig(
                "mtp_sliding_windows",
                got=self.mtp_window,
                wanted="0 or a window of the decoder, where multi-token prediction is built",
                where="provider",
            )
        self.mtp_use_repeated_layer = True
        super().finalize()

    @property
    def clamps_swiglu(self) -> bool:
        """Whether any layer clamps its SwiGLU."""
        return super().clamps_swiglu or any(self.swiglu_limits or ())

    def mtp_spec(self, vp_stage: int | None = None) -> MultiTokenPredictionBlockSubmodules | None:
        """Return the multi-token prediction of this stage: a dense layer of this model."""
        if not self.mtp_num_layers:
            return None
        backend = resolve_backend(self.backend)
        sliding = self.mtp_window is not None
        layer = exaone_moe_layer_spec(backend, moe=False)
        if self.swiglu_limits:
            layer.params = {"swiglu_limit": self.swiglu_limits[0]}  # as vLLM's exaone_moe_mtp.py
        return mtp_block_spec(
            self,
            backend,
            layer,
            sliding=sliding,
            use_rope=sliding,
            vp_stage=vp_stage,
        )


def exaone_moe_provider(
    model_config: ExaoneMoeModelConfig, hf_config: JSONMapping
) -> ExaoneMoeModelProvider:
    """Return the provider of this model.

    Args:
        model_config: of the model to be built.
        hf_config: the config.json that it came from, which the provider keeps for the export.
    """
    moe, mtp, windows = model_config.moe, model_config.mtp, model_config.windows
    largest = max((window for window in windows if window), default=None)
    several = len({*windows} - {None}) > 1
    window_size, window_layers = megatron_window(
        [largest if window else None for window in windows]
    )
    prediction = {} if mtp is None else mtp.provider_fields() | {"mtp_window": mtp.window}
    return ExaoneMoeModelProvider(
        **provider_fields(model_config, hf_config),
        **moe.provider_fields(),
        **prediction,
        moe_shared_expert_intermediate_size=moe.shared_ffn_size,
        moe_layer_freq=[int(is_moe) for is_moe in moe.layer_mask],
        window_size=window_size,
        window_attn_skip_freq=window_layers,
        layer_windows=[window or 0 for window in windows] if several else None,
        swiglu_limits=list(model_config.swiglu_limits) if any(model_config.swiglu_limits) else None,
        no_rope_freq=megatron_rope(model_config.rope),
    )
