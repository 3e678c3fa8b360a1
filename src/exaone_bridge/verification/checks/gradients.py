"""Compares the gradients of the mean cross entropy, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.verification.activations.rounding import RoundingModel
from exaone_bridge.verification.report.report import Check

__all__ = ["Gradients", "ReferenceGradients", "compare_gradients", "relative_norm"]

Gradients = dict[str, torch.Tensor]  # Hugging Face name -> gradient in fp32, of the tensor's shape
_MAX_NAMED = 5  # parameters that the check names


@dataclass(frozen=True, slots=True)
class ReferenceGradients:
    """Transformers' gradients, and how much they change.

    Attributes:
        gradients: of every parameter that has one.
        amplification: the largest relative change of a gradient for a relative change of one in the
            embeddings.
    """

    gradients: Gradients
    amplification: float


def relative_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over that of `expected` (over 1 if it is all zero).

    An expert that no token has chosen has a gradient of zero.

    Args:
        found, expected: [...], of one shape.
    """
    size = expected.norm().item() if expected.any() else 1.0
    return (found - expected).norm().item() / size


def compare_gradients(
    reference: ReferenceGradients, found: Gradients, model_config: ModelConfig, tokens: int
) -> Check:
    """Check every gradient by the norm of its difference; the threshold is what rounding explains.

    Args:
        found: the gradients of Megatron-Core, Hugging Face name -> `[*weight.shape]`; a missing one
            fails.
        tokens: of all prompts together, over which a weight's gradient is summed.
    """
    differences = _differences(reference.gradients, found)
    rounding = RoundingModel(model_config, tokens)
    # Forward, backward, and the weight's own gradient, which is a sum over all tokens.
    terms = 3 * rounding.terms("output layer") + tokens
    threshold = rounding.threshold(terms, reference.amplification)
    worst = max(differences, key=lambda name: _nan_is_infinite(differences[name]))
    above = [
        f"{name} differs by {value:.1e}"
        for name, value in differences.items()
        if not value <= threshold
    ]
    return Check(
        "gradients",
        f"{len(differences)} gradients, the worst of {worst}",
        not above,
        "; ".join(above[:_MAX_NAMED]),
        threshold=f"{differences[worst]:.1e} of {threshold:.1e} (rounding)",
        metrics={
            "gradients": len(differences),
            "relative": differences[worst],
            "threshold": threshold,
            "worst": worst,
        },
    )


def _differences(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    return {
        name: relative_norm(found[name], expected[name]) if name in found else float("inf")
        for name in sorted(expected)
    }


def _nan_is_infinite(value: float) -> float:
    return float("inf") if value != value else value
