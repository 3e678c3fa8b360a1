"""What the host calls verified: one position's logits at cosine 0.98, and weights within 0.1 over exported names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["UpstreamVerdict", "upstream_verdict"]

COSINE, ATOL = 0.98, 0.1


@dataclass(frozen=True, slots=True)
class UpstreamVerdict:
    """The host's two figures; None: nothing to compare, because the model was not loaded or not exported."""

    cosine: float | None
    weights: float | None

    @classmethod
    def nothing(cls) -> UpstreamVerdict:
        """Our own refusal came first."""
        return cls(None, None)

    @property
    def asked(self) -> bool:
        """Whether there was anything to compare."""
        return self.cosine is not None or self.weights is not None

    @property
    def caught(self) -> bool:
        """Whether either figure is beyond the host's bound."""
        low = self.cosine is not None and not self.cosine >= COSINE
        far = self.weights is not None and not self.weights <= ATOL
        return low or far

    def cells(self) -> list[str]:
        """Three cells of a table."""
        figures = [f"{self.cosine:.4f}" if self.cosine is not None else "-"]
        figures.append(f"{self.weights:.3f}" if self.weights is not None else "-")
        return [*figures, "differs" if self.caught else "holds" if self.asked else "not asked"]


def upstream_verdict(
    expected: torch.Tensor | None,
    found: torch.Tensor | None,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
) -> UpstreamVerdict:
    """The host's criteria, on our prompts: the last position of each (the host's own are shorter).

    Args:
        expected, found: logits [N, S, V].
        before, after: the source's tensors, and those that came out: only the latter's names are looked at.
    """
    cosine = None
    if expected is not None and found is not None:
        cosine = (
            torch.nn.functional.cosine_similarity(expected[:, -1], found[:, -1], dim=-1)
            .min()
            .item()
        )
    pairs = [(before[name], tensor) for name, tensor in after.items() if name in before]
    gaps = [
        (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
        for a, b in pairs
    ]
    return UpstreamVerdict(cosine, max(gaps) if gaps else None)
