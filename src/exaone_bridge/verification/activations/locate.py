"""Where two models part first, and what usually causes a difference that begins there. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from exaone_bridge.verification.report.report import ActivationDiff, Divergence

__all__ = ["CAUSES", "locate"]

CAUSES: dict[str, tuple[str, ...]] = {
    "embedding": (
        "a permuted, cut or wrongly padded vocabulary",
        "another tensor loaded as the word embeddings",
    ),
    "norm": (
        "another epsilon (Megatron-Core's default is 1e-5)",
        "two norms of a layer swapped, or a norm before the sublayer instead of after it",
        "a norm's scale that was not loaded",
    ),
    "attention": (
        "RoPE: theta, scaling factor, half-rotated or interleaved, applied to a layer that has none or the reverse",
        "the window: off by one, on the wrong layer, or ignored",
        "queries, keys and values interleaved by another rule, heads permuted, or a projection transposed",
    ),
    "router": (
        "sigmoid where the model has softmax, or the selection bias added to the weights",
        "weights that are not divided by their sum",
        "the router's weight or bias loaded in half precision, or from another layer",
    ),
    "mlp": (
        "gate and up swapped",
        "experts permuted, a shared expert dropped or counted twice",
        "another activation function",
    ),
    "layer": (
        "a residual that is scaled, dropped or added at another place",
        "layers in another order",
    ),
    "vision embedding": (
        "pixels cut into patches by another rule, or channels and frames in another order",
        "another tensor loaded as the patches' projection",
    ),
    "vision norm": (
        "another epsilon (the tower's is 1e-6, whatever the language model's)",
        "windows of another size, which order the patches before the first block",
        "two norms of a block swapped",
    ),
    "vision attention": (
        "windows of another size, or blocks that see the whole image in other places",
        "the fused projection cut by the rule of as many key-value heads as queries",
        "RoPE of rows and columns: swapped, or another theta",
    ),
    "vision mlp": (
        "gate and up swapped",
        "a bias that was not loaded",
        "another activation function",
    ),
    "vision layer": (
        "a residual that is scaled, dropped or added at another place",
        "blocks in another order",
    ),
    "vision merger": (
        "patches that become one word in another order",
        "its two linears swapped, or their biases not loaded",
    ),
    "vision features": ("features in the order of the windows, and not of the image",),
    "output layer": (
        "an output layer that is tied where it should not be, or the reverse",
        "another tensor loaded as lm_head, or a missing bias",
    ),
}


def locate(places: Sequence[ActivationDiff]) -> Divergence | None:
    """The first place that parts; None if none does."""
    for place in places:
        if place.diverges:
            return Divergence(place.name, place.layer, place.sublayer, CAUSES[place.sublayer])
    return None
