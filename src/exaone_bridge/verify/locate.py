"""Where two models part first, and what usually causes a difference that begins there. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from exaone_bridge.verify.report import Location, Place

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
    "layer": ("a residual that is scaled, dropped or added at another place", "layers in another order"),
    "output layer": (
        "an output layer that is tied where it should not be, or the reverse",
        "another tensor loaded as lm_head, or a missing bias",
    ),
}


def locate(places: Sequence[Place]) -> Location | None:
    """The first place that parts; None if none does."""
    for place in places:
        if place.parts:
            return Location(place.name, place.layer, place.sublayer, CAUSES[place.sublayer])
    return None
