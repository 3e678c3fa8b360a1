"""The report of a verification: its checks, and the first activation where two models diverge.

No torch is imported here. `report.schema.json` beside this file describes the JSON form.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from exaone_bridge.schema.json_types import JSONMapping, JSONObject

__all__ = [
    "SCHEMA_VERSION",
    "ActivationDiff",
    "Check",
    "Divergence",
    "Report",
    "Status",
    "versions",
]

SCHEMA_VERSION = 2  # of `Report.to_dict`; raised only if a field is removed or changes its meaning

_PACKAGES = (
    "exaone-bridge",
    "megatron-bridge",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "torch",
)
_ARITHMETIC = ("logits", "gradients")


class Status(StrEnum):
    """The result of a check, or of a full report."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison, and whether it passed.

    Attributes:
        name: one of tensors, config, files, generation, logits, gradients.
        summary: the measured values in one sentence.
        passed: whether the measured values are within the threshold; True if the check was not run.
        details: the first differences, or why the check was not run.
        threshold: what `summary` is compared with.
        metrics: the measured values as numbers.
        ran: False if there was nothing to compare; such a check does not fail the report.
    """

    name: str
    summary: str
    passed: bool
    details: str = ""
    threshold: str = "equal"
    metrics: JSONMapping = field(default_factory=dict, compare=False)
    ran: bool = True

    @property
    def status(self) -> Status:
        """The check's result."""
        if not self.ran:
            return Status.NOT_RUN
        return Status.PASSED if self.passed else Status.FAILED

    @classmethod
    def not_run(cls, name: str, reason: str) -> Check:
        """Make a check that records why it was not run."""
        return cls(name, "-", True, reason, "-", ran=False)

    def to_dict(self) -> JSONObject:
        """Return the check as the JSON report has it."""
        return {
            "name": self.name,
            "status": self.status.value,
            "summary": self.summary,
            "threshold": self.threshold,
            "details": self.details,
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True, slots=True)
class ActivationDiff:
    """The difference of one activation between two models.

    Attributes:
        name: the Hugging Face module whose output it is.
        layer: global, 0-based; None outside the decoder layers.
        sublayer: embedding, norm, attention, router, mlp, layer or output layer; in a vision
            encoder vision embedding, norm, attention, mlp, layer, merger or features, without a
            layer.
        difference: the largest difference at any token, relative to the largest entry of that token
            (in half precision: at the median token).
        threshold: the largest difference that rounding explains.
    """

    name: str
    layer: int | None
    sublayer: str
    difference: float
    threshold: float

    @property
    def diverges(self) -> bool:
        """Whether the difference is above the threshold; NaN is."""
        return not self.difference <= self.threshold

    @property
    def share(self) -> float:
        """The difference, as a multiple of the threshold; NaN if either is."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.threshold if self.threshold else math.inf

    def nearness_key(self) -> tuple[bool, float]:
        """Sort key: activations that diverge come first, then those nearest to the threshold."""
        return not self.diverges, -self.share if self.share == self.share else -math.inf

    def to_dict(self) -> JSONObject:
        """Return the difference as the JSON report has it."""
        return dataclasses.asdict(self) | {"diverges": self.diverges}


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first activation where two models diverge, and the usual causes."""

    name: str
    layer: int | None
    sublayer: str
    causes: tuple[str, ...]

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return f"hidden states diverge at {layer}{self.sublayer} ({self.name})"


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """The checks of one model's round trip, or of two models against each other.

    It is true if `passed` is.

    Attributes:
        source, other: names of the folders; other is None for the source's own round trip.
        layout, backend: of the Megatron-Core model.
        dtype: of the arithmetic.
        model: family, parameter count and shape.
        activations: differences in execution order.
        divergence: the first of `activations` that diverges.
        tensors: name -> dtype, shape and SHA-256 of the source's tensors.
        notes: sentences about what was accepted of the source although its config says otherwise.
        setup: prompts, seed and other settings that the measured values depend on.
        seconds: duration of the full verification.
        date: of its start, in ISO 8601 with the time zone.
        host: name of the machine.
        device: name of the GPU or CPU.
        folder, other_folder: the folders, as absolute paths.
        revision, other_revision: the Hub's commits of the folders; empty: they do not tell.
    """

    source: str
    layout: str
    checks: tuple[Check, ...] = ()
    other: str | None = None
    backend: str = "auto"
    dtype: str = "float32"
    model: JSONMapping = field(default_factory=dict)
    activations: tuple[ActivationDiff, ...] = ()
    divergence: Divergence | None = None
    tensors: Mapping[str, JSONMapping] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    setup: JSONMapping = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    seconds: float = 0.0
    date: str = ""
    host: str = ""
    device: str = ""
    folder: str = ""
    revision: str = ""
    other_folder: str = ""
    other_revision: str = ""

    @property
    def passed(self) -> bool:
        """Whether at least one check ran, and none failed."""
        return any(check.ran for check in self.checks) and all(
            check.passed for check in self.checks
        )

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        lines = [f"{self.title}, {self.layout}, {self.dtype}: {self.status}"]
        for check in self.checks:
            text = check.summary if check.passed and check.ran else check.details or check.summary
            lines.append(f"  {check.name:<12}{check.status:<9}{text}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from exaone_bridge.verification.report.html import summary_html

        return summary_html(self)

    @property
    def status(self) -> Status:
        """`passed` or `failed`."""
        return Status.PASSED if self.passed else Status.FAILED

    @property
    def title(self) -> str:
        """The source's name, or both names."""
        return self.source if self.other is None else f"{self.source} against {self.other}"

    @property
    def parameters(self) -> int:
        """Elements of all tensors of the source."""
        return int(self.model.get("parameters", 0))

    def check(self, name: str) -> Check:
        """Return the check of this name.

        Raises:
            KeyError: the report has no such check.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def failures(self) -> str:
        """Return one line for each failed check, and the usual causes of the divergence."""
        lines = [
            f"{self.source}: {check.name}: {check.summary}; {check.details}"
            for check in self.checks
            if not check.passed
        ]
        if self.divergence is not None:
            causes = "; ".join(self.divergence.causes)
            lines.append(f"{self.source}: {self.divergence.sublayer}: usual causes: {causes}")
        return "\n".join(lines)

    @property
    def round_trip_passed(self) -> bool:
        """Whether every check passed but those of logits and gradients."""
        return all(check.passed for check in self.checks if check.name not in _ARITHMETIC)

    @property
    def max_logit_difference(self) -> float:
        """The largest absolute difference of any logit; NaN if logits were not compared."""
        metrics = [check.metrics for check in self.checks if check.name == "logits" and check.ran]
        return float(metrics[0]["max"]) if metrics else float("nan")

    @property
    def first_diverging_layer(self) -> str:
        """The layer of the divergence, its sublayer if it is outside the layers, `-` if none."""
        if self.divergence is None:
            return "-"
        layer = self.divergence.layer
        return self.divergence.sublayer if layer is None else str(layer)

    def to_dict(self) -> JSONObject:
        """Return plain data as `report.schema.json` describes it; NaN and infinity become null."""
        result: JSONObject = {"schema_version": SCHEMA_VERSION, "status": self.status.value}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if part.name in ("checks", "activations"):
                value = [item.to_dict() for item in value]
            elif part.name == "divergence" and value is not None:
                value = dataclasses.asdict(value)
            result[part.name] = value
        return json.loads(json.dumps(_finite(result)))

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict`, indented."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def write_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs no other."""
        from exaone_bridge.verification.report.html import html_of

        Path(path).write_text(html_of(self), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the measured values depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
