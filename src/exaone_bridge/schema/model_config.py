"""The config of a model, frozen and typed: what every family has, and the optional parts.

A family's config class derives from `ModelConfig` and adds what only this family has.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from exaone_bridge.errors import UnsupportedConfig
from exaone_bridge.schema.hf_config import boolean, non_negative_float, positive_int, read_dtype
from exaone_bridge.schema.hf_field import ConfigPart, hf_field
from exaone_bridge.schema.json_types import JSONObject

__all__ = [
    "HeadConfig",
    "HeadKind",
    "MTPConfig",
    "MoEConfig",
    "ModelConfig",
    "VisionConfig",
    "model_config_fields",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig(ConfigPart):
    """The mixture of experts of a model that has MoE layers.

    Attributes:
        layer_mask: for each layer of the model, whether its MLP is a mixture of experts.
        num_experts: routed experts of a layer.
        topk: routed experts that a token is sent to.
        expert_ffn_size: the feed-forward size of one expert.
        num_shared_experts: experts that every token visits.
    """

    layer_mask: tuple[bool, ...]
    num_experts: int = hf_field(
        "num_experts", read=positive_int, provider="num_moe_experts", axis="E"
    )
    topk: int = hf_field("num_experts_per_tok", read=positive_int, provider="moe_router_topk")
    expert_ffn_size: int = hf_field(
        "moe_intermediate_size", read=positive_int, provider="moe_ffn_hidden_size", axis="M"
    )
    num_shared_experts: int = 0

    @property
    def shared_ffn_size(self) -> int:
        """The feed-forward size of all shared experts together."""
        return self.expert_ffn_size * self.num_shared_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig(ConfigPart):
    """A vision encoder (Transformers' `vision_config`).

    Attributes:
        merge_size: patches along each side of the square that becomes one token.
        window_size: side of an attention window, in pixels.
        out_size: the language model's hidden size.
        full_attention: the blocks whose patches attend to their full image; in the others they
            attend to their window.
    """

    depth: int = hf_field("depth", read=positive_int)
    hidden_size: int = hf_field("hidden_size", read=positive_int, axis="v")
    ffn_size: int = hf_field("intermediate_size", read=positive_int, axis="f")
    num_heads: int = hf_field("num_heads", read=positive_int)
    num_kv_heads: int = hf_field("num_key_value_heads", read=positive_int)
    channels: int = hf_field("in_channels", read=positive_int, axis="c")
    patch_size: int = hf_field("patch_size", read=positive_int, axis="p")
    temporal_patch_size: int = hf_field("temporal_patch_size", read=positive_int, axis="t")
    merge_size: int = hf_field("spatial_merge_size", read=positive_int)
    window_size: int = hf_field("window_size", read=positive_int)
    out_size: int = hf_field("out_hidden_size", read=positive_int, axis="o")
    full_attention: tuple[int, ...] = hf_field("fullatt_block_indexes")

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def qkv_size(self) -> int:
        """Output features of the fused QKV projection: queries, then keys, then values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def patch_elements(self) -> int:
        """Elements of one patch, over its frames and channels."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class MTPConfig(ConfigPart):
    """Multi-token prediction (MTP) of a checkpoint that has it.

    Attributes:
        depth: how many tokens further it predicts; at least 1.
        shared: one layer serves every depth.
        loss_scale: the weight of its loss.
    """

    depth: int = hf_field("num_nextn_predict_layers", provider="mtp_depth")
    shared: bool = hf_field(
        "mtp_share_layers", read=boolean, provider="mtp_use_repeated_layer", default=False
    )
    loss_scale: float = hf_field(
        "mtp_loss_scaling_factor",
        read=non_negative_float,
        provider="mtp_loss_scaling_factor",
        default=0.1,
    )

    @property
    def num_layers(self) -> int:
        """Layers of MTP on disk."""
        return 1 if self.shared else self.depth


class HeadKind(StrEnum):
    """The heads of Transformers' `modeling_layers.py` (5.12.1)."""

    SEQUENCE_CLASSIFICATION = "sequence_classification"
    TOKEN_CLASSIFICATION = "token_classification"
    QUESTION_ANSWERING = "question_answering"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig(ConfigPart):
    """The head of a model that has one in place of the output layer of a language model.

    Attributes:
        kind: a value of `HeadKind`.
        num_labels: outputs for each token.
        dropout: probability with which training drops a hidden value before the head.
        pad_token_id: the token that pooling skips; None: there is none, or the head does not pool.
    """

    kind: str
    num_labels: int = hf_field(axis="L")
    dropout: float = 0.0
    pad_token_id: int | None = None

    @property
    def pools(self) -> bool:
        """Whether a sequence has the logits of one token, its last."""
        return self.kind == HeadKind.SEQUENCE_CLASSIFICATION

    @property
    def has_bias(self) -> bool:
        """Whether the head adds a bias."""
        return not self.pools

    @property
    def hf_name(self) -> str:
        """The head's name in Transformers' model."""
        return "qa_outputs" if self.kind == HeadKind.QUESTION_ANSWERING else "score"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(ConfigPart):
    """A model. Sizes are counts of elements; layers are counted from 0 over all pipeline stages.

    Attributes:
        ffn_size: the feed-forward size of a dense layer.
        norm_eps: the epsilon of every norm.
        init_std: the standard deviation that Transformers initialises weights with.
        tied: the output layer uses the token embedding's weight; False in a model with a head.
        dtype: named as in config.json ("bfloat16").
        moe, vision, mtp, head: None in a model that has no such part.
    """

    vocab_size: int = hf_field("vocab_size", read=positive_int, provider="vocab_size", axis="V")
    hidden_size: int = hf_field("hidden_size", read=positive_int, provider="hidden_size", axis="H")
    ffn_size: int = hf_field(
        "intermediate_size", read=positive_int, provider="ffn_hidden_size", axis="F"
    )
    num_layers: int = hf_field("num_hidden_layers", read=positive_int, provider="num_layers")
    num_heads: int = hf_field(
        "num_attention_heads", read=positive_int, provider="num_attention_heads"
    )
    num_kv_heads: int = hf_field(
        "num_key_value_heads", read=positive_int, provider="num_query_groups"
    )
    head_dim: int = hf_field("head_dim", provider="kv_channels", axis="D")
    norm_eps: float = hf_field(
        "rms_norm_eps", read=non_negative_float, provider="layernorm_epsilon"
    )
    tied: bool = hf_field(
        "tie_word_embeddings", read=boolean, provider="share_embeddings_and_output_weights"
    )
    dtype: str = hf_field("dtype", read=read_dtype)
    # Megatron-Bridge keeps the number of positions in the training sequence length.
    max_positions: int = hf_field(
        "max_position_embeddings", read=positive_int, provider="seq_length", training=True
    )
    init_std: float = hf_field(
        "initializer_range", read=non_negative_float, provider="init_method_std", training=True
    )
    rope_theta: float = hf_field(provider="rotary_base")
    moe: MoEConfig | None = None
    vision: VisionConfig | None = None
    mtp: MTPConfig | None = None
    head: HeadConfig | None = None

    @property
    def transformers_differs(self) -> str | None:
        """What Transformers 5.12.1 ignores of this model, or None if it computes the same."""
        return None

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer's number."""
        return tuple(range(self.num_layers))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer the keys that a query attends to, with its own; None: all before it."""
        return (None,) * self.num_layers

    @property
    def rope(self) -> tuple[bool, ...]:
        """For each layer whether RoPE is applied to queries and keys."""
        return (True,) * self.num_layers

    @property
    def moe_layer_mask(self) -> tuple[bool, ...]:
        """For each layer whether its MLP is a mixture of experts."""
        return (False,) * self.num_layers if self.moe is None else self.moe.layer_mask

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The numbers of the layers whose MLP is a mixture of experts."""
        return tuple(layer for layer, is_moe in enumerate(self.moe_layer_mask) if is_moe)

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE layer; 0 in a model without any."""
        return 0 if self.moe is None else self.moe.num_experts

    @property
    def expert_ffn_size(self) -> int:
        """The feed-forward size of one routed expert; 0 in a model without any."""
        return 0 if self.moe is None else self.moe.expert_ffn_size

    @property
    def dims(self) -> dict[str, int]:
        """Axis letter -> size, of all axes in the mappings (see `schema/param_mapping.py`)."""
        dims = self.axis_sizes | {
            "Q": self.num_heads * self.head_dim,
            "K": self.num_kv_heads * self.head_dim,
        }
        if (moe := self.moe) is not None:
            dims |= moe.axis_sizes | {"A": moe.shared_ffn_size}
        if self.head is not None:
            dims |= self.head.axis_sizes
        if self.mtp is not None:
            dims["J"] = 2 * self.hidden_size
        if (vision := self.vision) is not None:
            merged = vision.hidden_size * vision.merge_size**2
            dims |= vision.axis_sizes | {"q": vision.qkv_size, "m": merged}
        return dims


def model_config_fields(config_class: type[ModelConfig], provider: Any) -> JSONObject:
    """Return the model config's keyword arguments that every family reads in the same way.

    Args:
        config_class: of the family.
        provider: the model provider, or an object with its fields.

    Raises:
        UnsupportedConfig: a clamp of SwiGLU, where config.json has no field for one.
    """
    limit = provider.activation_func_clamp_value
    if limit and "swiglu_limits" not in config_class.__dataclass_fields__:
        raise UnsupportedConfig(
            "activation_func_clamp_value",
            got=limit,
            wanted="None for an export, because config.json of this model has no field for a clamp",
            where="provider",
            remedy="keep the model as a Megatron checkpoint, or write the weights alone with "
            "save_hf_weights",
        )
    dtype = str(provider.params_dtype).removeprefix("torch.")
    return config_class.values_from_provider(provider) | {"dtype": dtype}
