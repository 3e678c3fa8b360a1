"""The activations of a tiny model in Transformers, for tests that compare something with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.probe_points import ProbePoint


@dataclass(frozen=True, slots=True)
class Reference:
    """A model's config and probe points, and its activations for the tokens [N, S]."""

    model_config: ModelConfig
    points: tuple[ProbePoint, ...]
    tokens: torch.Tensor
    activations: Activations

    def copy(self) -> Activations:
        """The activations of another model that computes the same, to be changed by a test."""
        values = {name: value.clone() for name, value in self.activations.values.items()}
        return Activations(self.activations.logits.clone(), values)
