"""Multi-token prediction: Megatron-Core's layer around an EXAONE 4.0 layer.

Megatron-Core 0.19.2 numbers the layers of multi-token prediction from one again, and a transformer
layer looks up its window and its RoPE by that number in per-layer lists
(`transformer/attention.py`, `transformer/multi_token_prediction.py`). So it would get those of the
decoder's first layers, whatever the model's config is; here the layer spec sets them.
"""

from __future__ import annotations

import copy
from dataclasses import replace

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
from exaone_bridge.modules.causal_layer import CausalLayer

__all__ = ["MTPTransformerLayer", "mtp_block_spec"]


class MTPTransformerLayer(CausalLayer, TransformerLayer):
    """A transformer layer whose attention is set by arguments, not by its number.

    Args:
        sliding: whether it is sliding-window attention.
        use_rope: whether RoPE is applied.
        swiglu_limit: the clamp of gate and up, 0 for none; None: the config's.
        config, args, kwargs: of `TransformerLayer`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: object,
        sliding: bool,
        use_rope: bool,
        swiglu_limit: float | None = None,
        **kwargs: object,
    ) -> None:
        config = copy.copy(config)
        if swiglu_limit is not None:
            config.activation_func_clamp_value = swiglu_limit or None
        config.window_attn_skip_freq = [int(sliding)] * config.num_layers
        config.no_rope_freq = [int(not use_rope)] * config.num_layers
        super().__init__(config, *args, **kwargs)


def mtp_block_spec(
    config: TransformerConfig,
    backend: Backend,
    layer: ModuleSpec,
    *,
    sliding: bool,
    use_rope: bool,
    vp_stage: int | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """Build the spec of the multi-token prediction layers of a pipeline stage.

    Each layer normalises the embedding of the next token and the hidden state, concatenates them in
    this order, projects them to the hidden size, and runs `layer`. It shares the embedding and the
    output layer with the model.

    Args:
        config: the model's.
        backend: gives norms and linears.
        layer: the spec of a decoder layer.
        sliding, use_rope: see `MTPTransformerLayer`.
        vp_stage: the virtual pipeline stage.

    Returns:
        The spec; None if the stage has no such layer.
    """
    count = get_mtp_num_layers_to_build(config, vp_stage=vp_stage)
    if not count:
        return None
    transformer_layer = replace(
        layer,
        module=MTPTransformerLayer,
        params={**layer.params, "sliding": sliding, "use_rope": use_rope},
    )
    spec = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=backend.norm,
            hnorm=backend.norm,
            eh_proj=backend.column_linear,
            mtp_model_layer=transformer_layer,
            layer_norm=backend.norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(
        layer_specs=[spec] * (1 if config.mtp_use_repeated_layer else count)
    )
