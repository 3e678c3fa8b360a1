"""Finds the first activation that diverges, and lists the usual causes. No torch is imported."""

from __future__ import annotations

from collections.abc import Iterable

from exaone_bridge.verification.report.report import ActivationDiff, Divergence

__all__ = ["CAUSES", "first_divergence"]

CAUSES: dict[str, tuple[str, ...]] = {
    "embedding": (
        "a permuted, truncated or wrongly padded vocabulary",
        "another tensor loaded as the token embeddings",
    ),
    "norm": (
        "another epsilon (Megatron-Core's default is 1e-5)",
        "two norms of a layer swapped, or pre-norm instead of post-norm",
        "a norm weight that was not loaded",
    ),
    "attention": (
        "RoPE: theta, scaling factor, half-rotated or interleaved, or applied to the wrong layers",
        "the sliding window: off by one, on the wrong layers, or ignored",
        "the norm of queries and keys: another epsilon, the two weights swapped, or after RoPE",
        "queries, keys and values interleaved by another rule, heads permuted, or a projection "
        "transposed",
    ),
    "router": (
        "sigmoid where the model has softmax, or the selection bias added to the weights",
        "weights that are not divided by their sum",
        "the router's weight or bias loaded in half precision, or from another layer",
    ),
    "mlp": (
        "gate and up projections swapped",
        "experts permuted, a shared expert dropped or counted twice",
        "another activation function",
    ),
    "layer": (
        "a residual that is scaled, dropped or added elsewhere",
        "layers in another order",
    ),
    "vision embedding": (
        "pixels split into patches by another rule, or channels and frames in another order",
        "another tensor loaded as the patch projection",
    ),
    "vision norm": (
        "another epsilon (the vision encoder's is 1e-6, whatever the language model's)",
        "windows of another size, which order the patches before the first block",
        "two norms of a block swapped",
    ),
    "vision attention": (
        "windows of another size, or full attention in other blocks",
        "the fused QKV projection split as if there were as many KV heads as query heads",
        "RoPE of rows and columns swapped, or another theta",
    ),
    "vision mlp": (
        "gate and up projections swapped",
        "a bias that was not loaded",
        "another activation function",
    ),
    "vision layer": (
        "a residual that is scaled, dropped or added elsewhere",
        "blocks in another order",
    ),
    "vision merger": (
        "the patches of one token merged in another order",
        "the two linear layers swapped, or their biases not loaded",
    ),
    "vision features": ("features in the order of the windows instead of the image's",),
    "output layer": (
        "an output layer that is tied but should not be, or the reverse",
        "another tensor loaded as lm_head, or a missing bias",
    ),
}


def first_divergence(activations: Iterable[ActivationDiff]) -> Divergence | None:
    """Return the first activation that diverges, or None if none does.

    Args:
        activations: in execution order.
    """
    for each in activations:
        if each.diverges:
            return Divergence(each.name, each.layer, each.sublayer, CAUSES[each.sublayer])
    return None
