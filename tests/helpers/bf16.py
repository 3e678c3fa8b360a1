"""The rule for bf16 logits: Megatron-Core's are as close to fp32 as Transformers' own are.

Both sides are compared with Transformers' fp32 logits over the same tokens. In a model with experts
rounding moves the router's scores, and sends a token that is close to a tie to other experts than
fp32 does. Its logits then differ by the difference of two experts, whichever side it happens on, so
that a maximum over such tokens measures chance. Hence two rules:

- Where all three runs choose the same experts in every layer, the differences are bounded: their
  mean, and their maximum, as for a dense model, of which this is every token.
- The tokens that go to other experts than in fp32 are counted on each side. Megatron-Core may have
  as many as Transformers and what chance adds. A router that is wrong sends away far more.

Where an MoE layer has layers above it, a token also attends to tokens that went elsewhere below.
The maximum is then chance again (0.23 to 1.94 of Transformers' over seeds, where the mean is 0.67
to 0.92), but few tokens are affected much: the 90% quantile of the tokens' largest differences
(0.67 to 0.96) takes its place. To leave out all tokens after one that went elsewhere would leave
none.

Axes: T tokens of all prompts, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from exaone_bridge.checkpoint.hf.checkpoint import HFCheckpoint
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.probe_points import (
    Capture,
    ProbePoint,
    probe_points,
)
from exaone_bridge.verification.workflow.megatron import capture_megatron
from exaone_bridge.verification.workflow.transformers import capture_transformers, load
from exaone_bridge.verification.workflow.workload import PromptBatch
from tests.helpers.training import Images

Prompts = Sequence[tuple[torch.Tensor, list[Images]]]  # tokens [N, S], and each prompt's images

RATIO = 1.1  # of a distance to Transformers' own
QUANTILE = 0.9  # of the tokens
DEVIATIONS = 3.0  # standard deviations of the difference of two counts


@dataclass(frozen=True)
class Outputs:
    """What the rule compares of one run.

    Attributes:
        logits: [T, V] fp32.
        experts: bool [T, L * E], True for those that a token goes to; [T, 0] of a dense model.
        spreads: whether an MoE layer has layers above it, in which tokens attend to its outputs.
    """

    logits: torch.Tensor
    experts: torch.Tensor
    spreads: bool = False

    @classmethod
    def dense(cls, logits: torch.Tensor) -> Outputs:
        """Make the outputs of a model without experts from logits [..., V]."""
        logits = logits.flatten(0, -2)
        return cls(logits, torch.zeros(len(logits), 0, dtype=torch.bool))

    def chooses_as(self, other: Outputs) -> torch.Tensor:
        """Return bool [T]: whether a token goes to the same experts in every layer."""
        return (self.experts == other.experts).all(-1)


@dataclass(frozen=True)
class Distance:
    """The absolute differences to the fp32 logits of Transformers.

    Attributes:
        mean, max: over all logits.
        quantile: the 90% quantile of the tokens' largest differences.
    """

    mean: float
    quantile: float
    max: float

    @classmethod
    def between(cls, logits: torch.Tensor, reference: torch.Tensor) -> Distance:
        """Compare logits [T, V]."""
        difference = (logits - reference).abs()
        largest = difference.amax(-1)
        quantile = largest.quantile(QUANTILE).item()
        return cls(difference.mean().item(), quantile, largest.max().item())


@dataclass(frozen=True)
class Closeness:
    """Distances and counts of both sides; see the module.

    Attributes:
        megatron, hf: over the tokens that all three runs send to the same experts.
        tokens, compared: all tokens, and those.
        megatron_elsewhere, hf_elsewhere: the tokens that go to other experts than in fp32.
        spreads: see `Outputs`.
    """

    megatron: Distance
    hf: Distance
    tokens: int
    compared: int
    megatron_elsewhere: int
    hf_elsewhere: int
    spreads: bool

    @classmethod
    def of(cls, megatron: Outputs, hf: Outputs, reference: Outputs) -> Closeness:
        """Compare bf16 outputs of both sides with Transformers' fp32 outputs.

        Raises:
            AssertionError: no token goes to the same experts in all three.
        """
        same = [each.chooses_as(reference) for each in (megatron, hf)]
        both = same[0] & same[1]
        assert both.any(), f"None of {len(both)} tokens goes to the same experts in all runs."
        expected = reference.logits[both]
        distances = [Distance.between(each.logits[both], expected) for each in (megatron, hf)]
        elsewhere = [int((~each).sum()) for each in same]
        return cls(*distances, len(both), int(both.sum()), *elsewhere, reference.spreads)

    def failures(self) -> list[str]:
        """Return a line for each bound that Megatron-Core exceeds."""
        bounds = [
            (f"the {name} of the differences", getattr(self.megatron, name), RATIO * own)
            for name, own in asdict(self.hf).items()
            if name != ("max" if self.spreads else "quantile")
        ]
        # Both counts have the same mean if both round alike, and vary as Poisson's do.
        spread = math.sqrt(self.megatron_elsewhere + self.hf_elsewhere)
        most = RATIO * self.hf_elsewhere + DEVIATIONS * spread
        bounds.append(("tokens that go to other experts", self.megatron_elsewhere, most))
        return [
            f"{what}: {got:.4g}, at most {most:.4g}" for what, got, most in bounds if got > most
        ]


def assert_bf16_close(
    label: str,
    megatron: torch.Tensor | Outputs,
    hf: torch.Tensor | Outputs,
    reference: torch.Tensor | Outputs,
) -> None:
    """Check bf16 outputs of both sides against Transformers' fp32 outputs; see the module.

    Args:
        label: is printed.
        megatron, hf, reference: logits [..., V] of a dense model, or outputs.
    """
    runs = (megatron, hf, reference)
    outputs = [each if isinstance(each, Outputs) else Outputs.dense(each) for each in runs]
    closeness = Closeness.of(*outputs)
    print(f"{label}: {closeness}")
    assert not (failures := closeness.failures()), "\n".join(failures)


def hf_outputs(folder: Path, runs: Prompts, dtype: torch.dtype) -> Outputs:
    """Run Transformers, a prompt at a time."""
    checkpoint, model = HFCheckpoint.open(folder), load(folder, dtype)
    points = _routers(checkpoint)
    batches = [
        PromptBatch(prompt, [images] if images else ())
        for tokens, all_images in runs
        for prompt, images in zip(tokens.split(1), all_images or [{}] * len(tokens), strict=True)
    ]
    captured = [capture_transformers(model, points, batch, perturb=False) for batch in batches]
    return _outputs(checkpoint, captured)


def outputs_of(folder: Path, model: list[Any], runs: Prompts) -> Outputs | None:
    """Run a Megatron-Core model of this folder; return None before the last pipeline stage.

    Raises:
        KeyError: a router is on another pipeline stage.
    """
    checkpoint = HFCheckpoint.open(folder)
    points = _routers(checkpoint)
    captured = [capture_megatron(model, points, PromptBatch(*run)) for run in runs]
    return _outputs(checkpoint, captured) if captured[0].logits.numel() else None


def _routers(checkpoint: HFCheckpoint) -> list[ProbePoint]:
    points = probe_points(checkpoint.mappings)
    return [point for point in points if point.capture is Capture.ROUTER]


def _outputs(checkpoint: HFCheckpoint, runs: Sequence[Activations]) -> Outputs:
    """Join the runs; an expert is chosen if its weight is above zero."""
    logits = torch.cat([run.logits.flatten(0, 1) for run in runs])
    if not (points := _routers(checkpoint)):
        return Outputs.dense(logits)
    experts = [torch.cat([run.values[point.hf] for point in points], dim=-1) > 0 for run in runs]
    last = checkpoint.model_config.num_layers - 1
    spreads = any(point.layer != last for point in points)
    return Outputs(logits, torch.cat([each.flatten(0, 1) for each in experts]), spreads)
