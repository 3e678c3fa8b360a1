"""Compares the activations of two models: one difference and one threshold for each.

Axes: N prompts, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from exaone_bridge.schema.model_config import ModelConfig
from exaone_bridge.verification.activations.capture import Activations
from exaone_bridge.verification.activations.probe_points import LOGITS, Capture, ProbePoint
from exaone_bridge.verification.activations.rounding import RoundingModel
from exaone_bridge.verification.report.report import ActivationDiff

__all__ = ["compare_activations", "max_or_nan", "relative_difference", "token_sizes"]

_FEW = 8  # features

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # reference, compared, stable tokens


def token_sizes(values: torch.Tensor) -> torch.Tensor:
    """Return the size that differences of each token are relative to: its largest entry.

    A few values, as the logits of a head, may all be near zero by chance: there the largest entry
    of any token counts.

    Args:
        values: [N, S, features].

    Returns:
        [N, S], positive.
    """
    sizes = values.abs().amax(-1)
    if values.shape[-1] < _FEW and values.numel():
        sizes = sizes.max().expand_as(sizes)
    return sizes.clamp(min=torch.finfo(torch.float32).tiny)


def relative_difference(reference: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
    """Return the largest difference of each token, relative to the reference's `token_sizes`.

    Args:
        reference, compared: [N, S, features].

    Returns:
        [N, S]; NaN stays NaN, and a missing activation or another shape is infinity.
    """
    if compared.shape != reference.shape:
        return torch.full(reference.shape[:2], float("inf"))
    return (compared - reference).abs().amax(-1) / token_sizes(reference)


def max_or_nan(values: torch.Tensor) -> float:
    """Return the largest of the values [...], NaN if there is none."""
    return values.max().item() if values.numel() else float("nan")


def compare_activations(
    points: Iterable[ProbePoint],
    references: Sequence[Activations],
    compared: Sequence[Activations],
    model_config: ModelConfig,
    half_precision: Sequence[Activations] | None = None,
) -> tuple[ActivationDiff, ...]:
    """Compare every activation that the reference has, the worst of all prompts each.

    In fp32 the worst stable token counts, and the threshold is what rounding explains. In half
    precision the median token counts, and the threshold is twice the distance of Transformers' own
    run from its fp32 run.

    Args:
        references: the fp32 activations of Transformers, one for each batch of prompts.
        compared: the activations of the other model, of the same batches.
        half_precision: Transformers' own in half precision; None: `compared` is fp32.

    Returns:
        The differences in execution order; the logits last.
    """
    by_name = {point.hf: point for point in points}
    rounding = RoundingModel(model_config, max(run.logits.shape[1] for run in references))
    # Vision activations are in the batch with images only, which therefore has all names.
    names = max((run.values for run in references), key=len)
    found = []
    for name in (*names, LOGITS):
        point = by_name.get(name)
        if (
            point is not None
            and point.head_sharded
            and any(name not in run.values for run in compared)
        ):
            continue  # with TP no rank has all heads
        batches = [n for n, run in enumerate(references) if name == LOGITS or name in run.values]
        vision = point is not None and point.capture is Capture.PATCHES
        pairs: list[Pair] = [
            (
                _value(references[n], name),
                _value(compared[n], name),
                None if vision else references[n].stable,
            )
            for n in batches
        ]
        layer, sublayer, block = (
            (None, "output layer", None)
            if point is None
            else (point.layer, point.sublayer, point.block)
        )
        if half_precision is None:
            amplification = max(run.amplification.get(name, 1.0) for run in references)
            difference = max((_worst(*pair) for pair in pairs), key=_nan_is_infinite)
            threshold = rounding.threshold(rounding.terms(sublayer, layer, block), amplification)
        else:
            difference = _median([(a, b) for a, b, _ in pairs])
            own = [_value(half_precision[n], name) for n in batches]
            threshold = 2 * _median([(a, b) for (a, _, _), b in zip(pairs, own, strict=True)])
        found.append(ActivationDiff(name, layer, sublayer, difference, threshold))
    return tuple(found)


def _value(run: Activations, name: str) -> torch.Tensor:
    return run.logits if name == LOGITS else run.values.get(name, torch.empty(0))


def _worst(reference: torch.Tensor, compared: torch.Tensor, stable: torch.Tensor | None) -> float:
    relative = relative_difference(reference, compared)
    return max_or_nan(relative if stable is None else relative[stable])


def _median(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the median token's difference: a few tokens whose experts change must not count."""
    relative = [relative_difference(reference, compared).flatten() for reference, compared in pairs]
    return torch.cat(relative).median().item()


def _nan_is_infinite(value: float) -> float:
    return float("inf") if value != value else value
