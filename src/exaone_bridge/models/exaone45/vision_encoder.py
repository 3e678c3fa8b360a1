"""The vision tower: Transformers' own module, made to live in a Megatron-Core model.

Tensor-parallel ranks hold it whole. Cutting it would save little: of the 33B it is four parameters in a hundred, and
window attention of short pieces has nothing to gain from fewer heads a rank.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Exaone4_5_VisionConfig
from transformers.initialization import no_init_weights
from transformers.models.exaone4_5.modeling_exaone4_5 import (
    Exaone4_5_VisionModel,
    Exaone4_5_VisionRotaryEmbedding,
)

from exaone_bridge.schema.model_config import VisionConfig

__all__ = ["build_vision_encoder", "smallest_image"]


class _Fp32Angles(Exaone4_5_VisionRotaryEmbedding):
    """Transformers' angles, whose frequencies stay in fp32.

    They are a buffer there. Megatron-Core's half-precision wrapper casts all buffers; so they are a plain attribute.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        frequencies = self._buffers.pop("inv_freq")
        self._non_persistent_buffers_set.discard("inv_freq")
        self.__dict__["inv_freq"] = 1.0 / (
            self.theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
        )
        assert frequencies is not None

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        self.__dict__["inv_freq"] = self.inv_freq.to(position_ids.device)
        return super().forward(position_ids)


def build_vision_encoder(
    vision: VisionConfig, config: TransformerConfig, init_std: float
) -> Exaone4_5_VisionModel:
    """The tower of these facts, in the model's type; where activations are recomputed, its blocks' are too.

    Args:
        config: the language model's.
        init_std: of random weights.
    """
    theirs = Exaone4_5_VisionConfig(
        depth=vision.depth,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_size,
        num_heads=vision.num_heads,
        num_key_value_heads=vision.num_kv_heads,
        in_channels=vision.channels,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        spatial_merge_size=vision.merge_size,
        window_size=vision.window_size,
        out_hidden_size=vision.out_size,
        fullatt_block_indexes=list(vision.full_attention),
        initializer_range=init_std,
    )
    with contextlib.nullcontext() if config.perform_initialization else no_init_weights():
        vision_encoder = Exaone4_5_VisionModel._from_config(
            theirs, attn_implementation="sdpa", dtype=config.params_dtype
        )
    vision_encoder.rotary_pos_emb = _Fp32Angles(vision.head_dim // 2)
    if config.recompute_granularity == "full":
        vision_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in vision_encoder.parameters():
        # Every tensor-parallel rank has the whole gradient, and they must stay equal: their mean. With sequence
        # parallelism it has that of the features in its cut only: their sum (`finalize_model_grads.py`).
        if config.sequence_parallel:
            parameter.sequence_parallel = True
        else:
            parameter.average_gradients_across_tp_domain = True
    return vision_encoder


def smallest_image(vision: VisionConfig, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [patches, elements of one] and grid [1, 3] of a grey image that is one word."""
    pixels = torch.zeros(
        vision.merge_size**2, vision.patch_elements, dtype=like.dtype, device=like.device
    )
    return pixels, torch.tensor([[1, vision.merge_size, vision.merge_size]], device=like.device)
