"""Compares the logits of two models, and says by how much they differ.

Axes: N prompts, S tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.compare import max_or_nan, relative_difference
from exaone_bridge.verification.activations.rounding import HALF_PRECISION_RATIO
from exaone_bridge.verification.report.report import ActivationDiff, Check

__all__ = ["LogitMetrics", "compare_half_precision", "compare_logits"]


@dataclass(frozen=True, slots=True)
class LogitMetrics:
    """The differences of the logits at all stable tokens of all prompts.

    Attributes:
        tokens: tokens that are compared.
        skipped: tokens that are left out, because a rounding error decides which expert is chosen.
        max, mean: absolute difference of a logit.
        relative: the worst token's largest difference, relative to its largest logit; in half
            precision the mean distance from fp32, as a multiple of Transformers' own.
        threshold: what is compared with `relative`; in half precision, with the mean distance.
        kl_mean, kl_max: Kullback-Leibler divergence of the next-token distributions, in nats.
        top1: share of tokens with the same most probable next token.
    """

    tokens: int
    skipped: int
    max: float
    mean: float
    relative: float
    threshold: float
    kl_mean: float
    kl_max: float
    top1: float


def _metrics(
    references: Sequence[Activations], compared: Sequence[Activations], threshold: float
) -> LogitMetrics:
    masks = [_stable(run) for run in references]
    expected = torch.cat([run.logits[mask] for run, mask in zip(references, masks, strict=True)])
    found = torch.cat([run.logits[mask] for run, mask in zip(compared, masks, strict=True)])
    difference = (found - expected).abs()
    log_expected, log_found = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    # Rounding can make a divergence slightly negative.
    kl = (log_expected.exp() * (log_expected - log_found)).sum(-1).abs()
    return LogitMetrics(
        tokens=len(expected),
        skipped=sum(mask.numel() for mask in masks) - len(expected),
        max=max_or_nan(difference),
        mean=difference.mean().item(),
        relative=max_or_nan(relative_difference(expected[None], found[None])),
        threshold=threshold,
        kl_mean=kl.mean().item(),
        kl_max=max_or_nan(kl),
        top1=(found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    )


def _stable(run: Activations) -> torch.Tensor:
    if run.stable is None:
        return torch.ones(run.logits.shape[:2], dtype=torch.bool)
    return run.stable


def compare_logits(
    references: Sequence[Activations],
    compared: Sequence[Activations],
    activations: Sequence[ActivationDiff],
) -> Check:
    """Check the fp32 logits: every stable token must be within the threshold, and NaN never is.

    Args:
        references, compared: one for each batch of prompts.
        activations: of `compare_activations`; the last is the logits'.
    """
    metrics = _metrics(references, compared, activations[-1].threshold)
    skipped = f" ({metrics.skipped} after a router tie left out)" if metrics.skipped else ""
    return Check(
        "logits",
        f"max |difference| {metrics.max:.1e}, mean {metrics.mean:.1e}, KL {metrics.kl_max:.1e}, "
        f"top-1 agreement {metrics.top1:.1%}, {metrics.tokens} tokens{skipped}",
        metrics.tokens > 0 and not activations[-1].diverges,
        threshold=f"{metrics.relative:.1e} of {metrics.threshold:.1e} (rounding)",
        metrics=dataclasses.asdict(metrics),
    )


def compare_half_precision(
    references: Sequence[Activations],
    half_precision: Sequence[Activations],
    compared: Sequence[Activations],
    dtype: str,
) -> Check:
    """Check half-precision logits: their distance from fp32 is compared with Transformers' own.

    A distance is the mean over every logit of every prompt. Tokens after a router tie count: both
    models meet such ties.

    Args:
        references: Transformers' in fp32.
        half_precision: Transformers' in `dtype`.
        compared: the other model's in `dtype`.
    """

    def distance(runs: Sequence[Activations]) -> float:
        gaps = [
            (run.logits - reference.logits).abs().flatten()
            for reference, run in zip(references, runs, strict=True)
        ]
        return torch.cat(gaps).mean().item()

    every_token = [dataclasses.replace(run, stable=None) for run in references]
    own = distance(half_precision)
    found, threshold = distance(compared), HALF_PRECISION_RATIO * own
    metrics = dataclasses.replace(
        _metrics(every_token, compared, threshold), relative=found / own if own else float("inf")
    )
    return Check(
        "logits",
        f"mean distance from fp32 {found:.2e}, "
        f"{metrics.relative:.2f} of Transformers' own {dtype}; max {metrics.max:.1e}, "
        f"KL {metrics.kl_mean:.1e}, "
        f"top-1 agreement {metrics.top1:.1%}, {metrics.tokens} tokens",
        found <= threshold,
        threshold=f"{threshold:.2e} ({HALF_PRECISION_RATIO} x Transformers')",
        metrics=dataclasses.asdict(metrics),
    )
