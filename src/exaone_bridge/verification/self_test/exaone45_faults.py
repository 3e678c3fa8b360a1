"""Faults of EXAONE 4.5's tower: four blocks, of which 1 and 3 see the whole image, and the others windows of 24 pixels.

The language model is EXAONE 4.0's, whose faults are planted in its own miniature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exaone_bridge.verification.activations.probe_points import VISION_ENCODER
from exaone_bridge.verification.self_test.fault import Fault, patched, swap

__all__ = [
    "EXAONE45_FAULTS",
    "join_in_another_order",
    "leave_in_order_of_windows",
    "narrow_windows",
    "rotate_rows_for_columns",
    "round_patches",
]

MODEL = "exaone45"
PATCHES = 4  # that become one word


def _block(vision_encoder: Any, number: int) -> Any:
    return vision_encoder.blocks[number]


def _channels(vision_encoder: Any) -> None:
    weight = vision_encoder.patch_embed.proj.weight
    weight.copy_(weight.flip(1))


def _key_heads(vision_encoder: Any) -> None:
    attention = _block(vision_encoder, 1).attn
    keys = attention.qkv.weight[attention.q_dim : attention.q_dim + attention.kv_dim].chunk(2)
    swap(*keys)


def _key_value(vision_encoder: Any) -> None:
    attention = _block(vision_encoder, 2).attn
    swap(*attention.qkv.weight[attention.q_dim :].chunk(2))


def _gate_up(vision_encoder: Any) -> None:
    mlp = _block(vision_encoder, 0).mlp
    swap(mlp.gate_proj.weight, mlp.up_proj.weight)


def _norms(vision_encoder: Any) -> None:
    block = _block(vision_encoder, 3)
    swap(block.norm1.weight, block.norm2.weight)


def _blocks(vision_encoder: Any) -> None:
    for a, b in zip(
        _block(vision_encoder, 1).parameters(), _block(vision_encoder, 3).parameters(), strict=True
    ):
        swap(a, b)


def join_in_another_order(vision_encoder: Any) -> None:
    """Patches of one word."""
    first = vision_encoder.merger.mlp[0].weight
    first.copy_(first.view(len(first), PATCHES, -1).flip(1).reshape(first.shape))


def _bias(vision_encoder: Any) -> None:
    vision_encoder.merger.mlp[2].bias.zero_()


def _weights(name: str, change: Callable[[Any], None], sublayer: str) -> Fault:
    """The tower that was loaded, changed in place."""

    def changed(model: Any) -> None:
        change(model[0].visual)

    return Fault(
        name=name,
        model=MODEL,
        caught=("tensors", "logits"),
        begins=(None, VISION_ENCODER + sublayer),
        weights=changed,
    )


def _built(name: str, change: Callable[[Any], None], sublayer: str) -> Fault:
    """The tower as it is built, then changed; every weight is right, and only the arithmetic can tell."""

    def planted() -> Any:
        from exaone_bridge.models.exaone45 import provider

        right = provider.build_vision_encoder

        def faulty(*args: Any) -> Any:
            vision_encoder = right(*args)
            change(vision_encoder)
            return vision_encoder

        return patched("exaone_bridge.models.exaone45.provider.build_vision_encoder", faulty)()

    return Fault(
        name=name,
        model=MODEL,
        caught=("logits",),
        begins=(None, VISION_ENCODER + sublayer),
        code=planted,
    )


def _epsilon(vision_encoder: Any) -> None:
    for module in vision_encoder.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5


def narrow_windows(vision_encoder: Any) -> None:
    """A third as wide."""
    vision_encoder.window_size //= 3


def _no_window(vision_encoder: Any) -> None:
    vision_encoder.fullatt_block_indexes = [0, 1, 2, 3]


def rotate_rows_for_columns(vision_encoder: Any) -> None:
    """RoPE's two coordinates of a patch."""
    vision_encoder.rotary_pos_emb.register_forward_pre_hook(
        lambda _, arguments: arguments[0].flip(-1)
    )


def leave_in_order_of_windows(vision_encoder: Any) -> None:
    """Features that are not in the image's order."""

    def rolled(_: Any, __: Any, output: Any) -> Any:
        output.pooler_output = output.pooler_output.roll(1, 0)
        return output

    vision_encoder.register_forward_hook(rolled)


def round_patches(vision_encoder: Any) -> None:
    """To bf16."""
    vision_encoder.patch_embed.register_forward_hook(
        lambda _, __, output: output.to(torch.bfloat16).to(output.dtype)
    )


EXAONE45_FAULTS: tuple[Fault, ...] = (
    _weights("channels of a patch reversed", _channels, "embedding"),
    _weights("key heads of a block change places", _key_heads, "attention"),
    _weights("keys and values of a block swapped", _key_value, "attention"),
    _weights("gate and up of a block swapped", _gate_up, "mlp"),
    _weights("norms of a block swapped", _norms, "norm"),
    _weights("blocks 1 and 3 change places", _blocks, "norm"),
    _weights("patches of a word joined in another order", join_in_another_order, "merger"),
    _weights("a bias of the merger lost", _bias, "merger"),
    _built("Megatron-Core's epsilon in the tower", _epsilon, "norm"),
    _built(
        "windows of a third", narrow_windows, "norm"
    ),  # they order the patches before the first block
    _built("every block sees the whole image", _no_window, "attention"),
    _built("rows rotated for columns", rotate_rows_for_columns, "attention"),
    _built("features in another order", leave_in_order_of_windows, "features"),
    _built("patches in bf16", round_patches, "embedding"),
    Fault(
        name="another word for images",
        model=MODEL,
        caught=("refused",),  # counts of words and features differ
        provider={"image_token_id": 69},
    ),
)
