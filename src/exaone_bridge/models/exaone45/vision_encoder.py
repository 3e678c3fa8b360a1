"""The vision encoder: Transformers' own module inside a Megatron-Core model.

It is replicated across TP. Sharding it would save little: it has 4% of the 33B model's parameters,
and window attention on short sequences does not get faster with fewer heads per rank.

Axes: P patches, C elements per patch, D head dimension of the vision encoder.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Exaone4_5_VisionConfig
from transformers.initialization import no_init_weights
from transformers.models.exaone4_5.modeling_exaone4_5 import (
    Exaone4_5_VisionModel,
    Exaone4_5_VisionRotaryEmbedding,
)

from exaone_bridge.schema.model_config import VisionConfig

__all__ = ["build_vision_encoder", "dummy_image"]


class _Fp32VisionRotaryEmbedding(Exaone4_5_VisionRotaryEmbedding):
    """Transformers' vision RoPE with frequencies [D / 4] that stay in fp32.

    Transformers keeps them in buffers, and Megatron-Core's half-precision wrapper casts all
    buffers; so they are plain attributes here.
    """

    def __init__(self, argument: Any) -> None:
        super().__init__(argument)
        self.__dict__["frequencies"] = tuple(self._buffers)
        for name in self.frequencies:
            self._non_persistent_buffers_set.discard(name)
            self.__dict__[name] = self._buffers.pop(name).float()

    def forward(self, *arguments: torch.Tensor) -> Any:
        """Compute the angles of row and column indices, the last argument.

        The indices are [P, 2] up to Transformers 5.15; later they are [2, P], after hidden states.
        """
        for name in self.frequencies:
            self.__dict__[name] = getattr(self, name).to(arguments[-1].device)
        return super().forward(*arguments)


def build_vision_encoder(
    vision: VisionConfig, config: TransformerConfig, init_std: float
) -> Exaone4_5_VisionModel:
    """Build the vision encoder, in the dtype and with the recomputation of the language model.

    Args:
        vision: the vision config.
        config: the language model's.
        init_std: standard deviation of random weights.
    """
    hf_config = Exaone4_5_VisionConfig(
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
            hf_config, attn_implementation="sdpa", dtype=config.params_dtype
        )
    # Transformers after 5.15 takes the config here, and 5.15 half the dimension of a head.
    takes_config = "config" in inspect.signature(Exaone4_5_VisionRotaryEmbedding).parameters
    vision_encoder.rotary_pos_emb = _Fp32VisionRotaryEmbedding(
        vision_encoder.config if takes_config else vision.head_dim // 2
    )
    if config.recompute_granularity == "full":
        vision_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in vision_encoder.parameters():
        # The replicas must stay equal. With sequence parallelism each TP rank has the gradient of
        # the features in its shard only, so gradients are summed over TP; otherwise each has all of
        # it, and they are averaged (Megatron-Core 0.19.2, `distributed/finalize_model_grads.py`).
        if config.sequence_parallel:
            parameter.sequence_parallel = True
        else:
            parameter.average_gradients_across_tp_domain = True
    return vision_encoder


def dummy_image(vision: VisionConfig, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a dummy image of one feature.

    Args:
        vision: the vision config.
        like: a tensor with the device and dtype of the result.

    Returns:
        Pixels [P, C] of zeros, and the grid [1, 3].
    """
    side = vision.merge_size
    pixels = torch.zeros(side**2, vision.patch_elements, dtype=like.dtype, device=like.device)
    return pixels, torch.tensor([[1, side, side]], device=like.device)
