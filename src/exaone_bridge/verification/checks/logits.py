"""Logits of every position and what lies on the way to them: one side against the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.probe_points import (
    LOGITS,
    VISION_ENCODER,
    Capture,
    ProbePoint,
)
from exaone_bridge.verification.checks.precision import BF16_RATIO, RoundingModel
from exaone_bridge.verification.report.report import ActivationDiff, Check

__all__ = ["compare_activations", "compare_half_precision", "compare_logits", "prompts"]


def prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """[count, length] int64: words drawn from the whole vocabulary."""
    return torch.randint(vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))


def _relative(reference: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """[N, S]: the largest difference at each position, by the largest entry there; NaN stays NaN.

    What one side alone has, or has in another shape, is infinitely far.
    """
    if ours.shape != reference.shape:
        return torch.full(reference.shape[:2], float("inf"))
    size = reference.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (ours - reference).abs().amax(-1) / size


def _worst(relative: torch.Tensor, decided: torch.Tensor | None) -> float:
    return _max(relative if decided is None else relative[decided])


@dataclass(frozen=True, slots=True)
class LogitMetrics:
    """How far logits are apart, over the positions of all prompts that count."""

    positions: int
    skipped: int  # positions where rounding decides which expert is chosen
    max: float
    mean: float
    relative: float  # the worst position's, by its largest logit
    threshold: float
    kl_mean: float
    kl_max: float
    top1: float

    def text(self) -> str:
        skipped = f" ({self.skipped} behind a router's tie left out)" if self.skipped else ""
        return (
            f"max |difference| {self.max:.1e}, mean {self.mean:.1e}, KL {self.kl_max:.1e}, "
            f"top-1 agreement {self.top1:.1%}, {self.positions} positions{skipped}"
        )


def _figures(
    references: Sequence[Activations], ours: Sequence[Activations], threshold: float
) -> LogitMetrics:
    expected = torch.cat([run.logits[_mask(run)] for run in references])
    found = torch.cat([mine.logits[_mask(run)] for run, mine in zip(references, ours, strict=True)])
    difference = (found - expected).abs()
    logs, ours_logs = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (
        (logs.exp() * (logs - ours_logs)).sum(-1).abs()
    )  # rounding can make it a little less than zero
    total = sum(run.logits.shape[0] * run.logits.shape[1] for run in references)
    return LogitMetrics(
        positions=len(expected),
        skipped=total - len(expected),
        max=_max(difference),
        mean=difference.mean().item(),
        relative=_max(_relative(expected[None], found[None])),
        threshold=threshold,
        kl_mean=kl.mean().item(),
        kl_max=_max(kl),
        top1=(found.argmax(-1) == expected.argmax(-1)).double().mean().item(),
    )


def _max(values: torch.Tensor) -> float:
    return values.max().item() if values.numel() else float("nan")


def _mask(run: Activations) -> torch.Tensor:
    return torch.ones(run.logits.shape[:2], dtype=torch.bool) if run.stable is None else run.stable


def compare_logits(
    references: Sequence[Activations], ours: Sequence[Activations], places: Sequence[ActivationDiff]
) -> Check:
    """The line for fp32: every position of every prompt within the bound of rounding; NaN never holds.

    Args:
        references, ours: a run for each length of prompts.
        places: of `compare_activations`; the last is the logits'.
    """
    figures = _figures(references, ours, places[-1].threshold)
    passed = figures.positions > 0 and not places[-1].diverges
    bound = f"{figures.relative:.1e} of {figures.threshold:.1e} (rounding)"
    return Check(
        "logits", figures.text(), passed, threshold=bound, metrics=dataclasses.asdict(figures)
    )


def compare_half_precision(
    references: Sequence[Activations],
    theirs: Sequence[Activations],
    ours: Sequence[Activations],
    dtype: str,
) -> Check:
    """The line for bf16: no farther from Transformers' fp32 than Transformers' own bf16 is.

    Distances are means over every logit of every prompt. Routers' ties count: both sides meet them.
    """

    def distance(side: Sequence[Activations]) -> float:
        gaps = [
            (mine.logits - run.logits).abs().flatten()
            for run, mine in zip(references, side, strict=True)
        ]
        return torch.cat(gaps).mean().item()

    whole = [dataclasses.replace(run, stable=None) for run in references]
    own, bound = distance(ours), BF16_RATIO * distance(theirs)
    figures = dataclasses.replace(_figures(whole, ours, bound), relative=own / bound * BF16_RATIO)
    text = (
        f"mean distance from fp32 {own:.2e}, {figures.relative:.2f} of Transformers' own {dtype}; "
        f"max {figures.max:.1e}, KL {figures.kl_mean:.1e}, "
        f"top-1 agreement {figures.top1:.1%}, {figures.positions} positions"
    )
    limit = f"{bound:.2e} ({BF16_RATIO} x Transformers')"
    return Check("logits", text, own <= bound, threshold=limit, metrics=dataclasses.asdict(figures))


def compare_activations(
    points: Iterable[ProbePoint],
    references: Sequence[Activations],
    ours: Sequence[Activations],
    model_config: Any,
    theirs: Sequence[Activations] | None = None,
) -> tuple[ActivationDiff, ...]:
    """Every place that both sides saw, in the order of the arithmetic; the worst of all prompts; the logits last.

    Args:
        theirs: Transformers' own run in half precision: then the median position is held against twice theirs.
    """
    table = {point.hf: point for point in points}
    rounding = RoundingModel(model_config, max(run.logits.shape[1] for run in references))
    places = []
    names = max(
        (run.values for run in references), key=len
    )  # a vision tower is in those that have images
    for name in (*names, LOGITS):
        point = table.get(name)
        if point is not None and point.heads and any(name not in run.values for run in ours):
            continue  # tensor parallelism: a rank has some heads only
        layer, sublayer = (None, "output layer") if point is None else (point.layer, point.sublayer)
        vision_encoder = point if point is not None and point.capture is Capture.PATCHES else None
        runs = [
            number for number, run in enumerate(references) if name == LOGITS or name in run.values
        ]
        pairs = [
            (
                _of(references[n], name),
                _of(ours[n], name),
                None if vision_encoder else references[n].stable,
            )
            for n in runs
        ]
        if theirs is None:
            difference = max((_worst(_relative(a, b), mask) for a, b, mask in pairs), key=_nan_last)
            amplification = max(run.amplification.get(name, 1.0) for run in references)
            if vision_encoder is None:
                terms = rounding.terms(layer, sublayer, is_last=sublayer != "embedding")
            else:
                terms = rounding.vision_terms(
                    vision_encoder.block, sublayer.removeprefix(VISION_ENCODER)
                )
            bound = rounding.threshold(terms, amplification)
        else:
            difference = _typical([_relative(a, b) for a, b, _ in pairs])
            other = [
                _relative(a, _of(theirs[n], name)) for (a, _, _), n in zip(pairs, runs, strict=True)
            ]
            bound = 2 * _typical(other)
        places.append(ActivationDiff(name, layer, sublayer, difference, bound))
    return tuple(places)


def _typical(relatives: Sequence[torch.Tensor]) -> float:
    """The median position's: a few tokens whose experts change by rounding say nothing; NaN where any is."""
    return torch.cat([relative.flatten() for relative in relatives]).median().item()


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _of(run: Activations, name: str) -> torch.Tensor:
    return run.logits if name == LOGITS else run.values.get(name, torch.empty(0))
