"""Faults of EXAONE 4.5: of the vision encoder, and of what joins it to the language model.

The tiny vision encoder has four blocks: blocks 1 and 3 have full attention, blocks 0 and 2 attend
within windows of 24 pixels. Faults of the language model, which is EXAONE 4.0's, are injected into
the tiny EXAONE 4.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from exaone_bridge.verification.activations.probe_points import VISION_PREFIX
from exaone_bridge.verification.self_test.fault import (
    CodeFault,
    Fault,
    FaultSite,
    ProviderFault,
    WeightFault,
    changed_model,
    swap,
)

__all__ = ["EXAONE45_FAULTS"]

MODEL = "exaone45"
PATCHES_PER_TOKEN = 4

EncoderChange = Callable[[torch.nn.Module], None]
"""Changes Transformers' vision encoder, which Megatron-Core runs too, in place."""


# --- weights --------------------------------------------------------------------------------------


def _reverse_channels(encoder: torch.nn.Module) -> None:
    weight = encoder.patch_embed.proj.weight
    weight.copy_(weight.flip(1))


def _swap_key_heads(encoder: torch.nn.Module) -> None:
    attention = encoder.blocks[1].attn
    keys = attention.qkv.weight[attention.q_dim : attention.q_dim + attention.kv_dim]
    swap(*keys.chunk(2))


def _swap_keys_and_values(encoder: torch.nn.Module) -> None:
    attention = encoder.blocks[2].attn
    swap(*attention.qkv.weight[attention.q_dim :].chunk(2))


def _swap_gate_and_up(encoder: torch.nn.Module) -> None:
    mlp = encoder.blocks[0].mlp
    swap(mlp.gate_proj.weight, mlp.up_proj.weight)


def _swap_norms(encoder: torch.nn.Module) -> None:
    block = encoder.blocks[3]
    swap(block.norm1.weight, block.norm2.weight)


def _swap_blocks(encoder: torch.nn.Module) -> None:
    first, second = encoder.blocks[1], encoder.blocks[3]
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        swap(a, b)


def _reverse_merged_patches(encoder: torch.nn.Module) -> None:
    weight = encoder.merger.mlp[0].weight
    weight.copy_(weight.view(len(weight), PATCHES_PER_TOKEN, -1).flip(1).reshape(weight.shape))


def _zero_merger_bias(encoder: torch.nn.Module) -> None:
    encoder.merger.mlp[2].bias.zero_()


# --- arithmetic -----------------------------------------------------------------------------------


def _epsilon(value: float) -> EncoderChange:
    def change(encoder: torch.nn.Module) -> None:
        for module in encoder.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = value

    return change


def _narrow_windows(encoder: torch.nn.Module) -> None:
    encoder.window_size //= 3


def _full_attention(*blocks: int) -> EncoderChange:
    def change(encoder: torch.nn.Module) -> None:
        encoder.fullatt_block_indexes = list(blocks)

    return change


def _transpose_patches(encoder: torch.nn.Module) -> None:
    """Transpose the square of patches that becomes one token."""

    def transpose(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.Tensor:
        pixels = arguments[0]  # [patches, pixels of each]
        return pixels.view(-1, 2, 2, pixels.shape[-1]).transpose(1, 2).reshape(pixels.shape)

    encoder.patch_embed.register_forward_pre_hook(transpose)


def _swap_rope_axes(encoder: torch.nn.Module) -> None:
    encoder.rotary_pos_emb.register_forward_pre_hook(lambda _, arguments: arguments[0].flip(-1))


def _roll_features(encoder: torch.nn.Module) -> None:
    def roll(_: torch.nn.Module, __: object, output: Any) -> Any:
        output.pooler_output = output.pooler_output.roll(1, 0)
        return output

    encoder.register_forward_hook(roll)


def _round_patches(encoder: torch.nn.Module) -> None:
    encoder.patch_embed.register_forward_hook(
        lambda _, __, output: output.to(torch.bfloat16).to(output.dtype)
    )


def _reverse_features() -> contextlib.AbstractContextManager[object]:
    """Assign the features to the image placeholder tokens in reverse order."""
    from exaone_bridge.models.exaone45.model import Exaone45Model

    original = Exaone45Model._placeholders

    def reverse(self: Exaone45Model, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positions, numbers = original(self, *args)
        return positions, numbers.flip(0)

    return mock.patch.object(Exaone45Model, "_placeholders", reverse)


# --- the list -------------------------------------------------------------------------------------


def _site(sublayer: str, module: str) -> FaultSite:
    name = f"model.visual.{module}" if module else "model.visual"
    return FaultSite(VISION_PREFIX + sublayer, module=name)


def _weights(name: str, change: EncoderChange, sublayer: str, module: str) -> Fault:
    return WeightFault(
        name=name,
        model=MODEL,
        failing=("tensors", "logits"),
        site=_site(sublayer, module),
        change=lambda model: change(model[0].visual),
    )


def _code(name: str, change: EncoderChange, sublayer: str, module: str) -> Fault:
    """Return a fault: a vision encoder with the right weights, whose arithmetic is changed."""
    return CodeFault(
        name=name,
        model=MODEL,
        failing=("logits",),
        site=_site(sublayer, module),
        patch=lambda: changed_model(lambda model: change(model[0].visual)),
    )


EXAONE45_FAULTS: tuple[Fault, ...] = (
    _weights("channels of a patch reversed", _reverse_channels, "embedding", "patch_embed"),
    _weights("key heads of a block swapped", _swap_key_heads, "attention", "blocks.1.attn"),
    _weights(
        "keys and values of a block swapped", _swap_keys_and_values, "attention", "blocks.2.attn"
    ),
    _weights("gate and up of a block swapped", _swap_gate_and_up, "mlp", "blocks.0.mlp"),
    _weights("norms of a block swapped", _swap_norms, "norm", "blocks.3.norm1"),
    _weights("blocks 1 and 3 swapped", _swap_blocks, "norm", "blocks.1.norm1"),
    _weights("patches of a token merged in reverse", _reverse_merged_patches, "merger", "merger"),
    _weights("a bias of the merger lost", _zero_merger_bias, "merger", "merger"),
    _code("epsilon 1e-5 instead of 1e-6", _epsilon(1e-5), "norm", "blocks.0.norm1"),
    _code("epsilon 1e-2 instead of 1e-6", _epsilon(1e-2), "norm", "blocks.0.norm1"),
    # Patches are ordered by window before the first block.
    _code("windows a third as wide", _narrow_windows, "norm", "blocks.0.norm1"),
    _code(
        "full attention in every block", _full_attention(0, 1, 2, 3), "attention", "blocks.0.attn"
    ),
    _code(
        "full attention in blocks 0 and 2, not 1 and 3",
        _full_attention(0, 2),
        "attention",
        "blocks.0.attn",
    ),
    _code("patches of a token transposed", _transpose_patches, "embedding", "patch_embed"),
    _code("RoPE of rows applied to columns", _swap_rope_axes, "attention", "blocks.0.attn"),
    _code("features in another order", _roll_features, "features", ""),
    _code("patches rounded to bf16", _round_patches, "embedding", "patch_embed"),
    CodeFault(
        name="features at the wrong placeholder tokens",
        model=MODEL,
        failing=("logits",),
        site=FaultSite("attention", 0),
        patch=_reverse_features,
    ),
    # The numbers of placeholder tokens and of features differ.
    ProviderFault(
        name="another image token",
        model=MODEL,
        failing=("rejected",),
        fields={"image_token_id": 69},
    ),
)
