"""Multi-token prediction: Megatron-Core's layer around one of ours, which says itself what it attends to.

Megatron-Core numbers the layers of multi-token prediction from one again, and a layer looks up its window and its RoPE
in per-layer lists by that number: those of the decoder's first layers, whatever the model's own rule is
(`megatron/core/transformer/attention.py`, `multi_token_prediction.py`).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from exaone_bridge.modules.backend import Backend

__all__ = ["PredictionLayer", "mtp_block_spec"]


class PredictionLayer(TransformerLayer):
    """A transformer layer that has the model's window, and RoPE, or has not, whatever its number."""

    def __init__(
        self, config: TransformerConfig, *args: Any, windowed: bool, rotated: bool, **kwargs: Any
    ) -> None:
        own = copy.copy(config)
        own.window_attn_skip_freq = [int(windowed)] * config.num_layers
        own.no_rope_freq = [int(not rotated)] * config.num_layers
        super().__init__(own, *args, **kwargs)


def mtp_block_spec(
    config: TransformerConfig,
    backend: Backend,
    layer: ModuleSpec,
    *,
    windowed: bool,
    rotated: bool,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """The layers of multi-token prediction of this stage; None: it has none.

    Each normalises the next word's embedding and the hidden state, puts the first before the second, projects both, and
    runs `layer`; embedding and output layer are the model's own.
    """
    count = get_mtp_num_layers_to_build(config, vp_stage=vp_stage)
    if not count:
        return None
    inner = replace(
        layer,
        module=PredictionLayer,
        params={**layer.params, "windowed": windowed, "rotated": rotated},
    )
    spec = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.column_linear,
            mtp_model_layer=inner,
            layer_norm=backend.norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(
        layer_specs=[spec] * (1 if config.mtp_use_repeated_layer else count)
    )
