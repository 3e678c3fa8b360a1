"""What a verification says: checks with a figure, a bound and a verdict each, and where two models part. No torch."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA", "ActivationDiff", "Check", "Location", "Report", "Verdict", "versions"]

SCHEMA = 1  # of `Report.to_json`; raised only where a field goes away or changes its meaning

_PACKAGES = (
    "exaone-bridge",
    "megatron-bridge",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "torch",
)


class Verdict(StrEnum):
    """Of one check."""

    PASSED = "holds"
    FAILED = "differs"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was checked, the figure that was found, whether it holds, and where it does not.

    Attributes:
        where: what differs first; or why the check was not run.
        bound: what the figure is held against.
        values: the figure's numbers, for programs.
        ran: False: nothing could be said, and `holds` says nothing.
    """

    name: str
    figure: str
    passed: bool
    where: str = ""
    bound: str = "equal"
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)
    ran: bool = True

    @property
    def verdict(self) -> Verdict:
        """`holds`, `differs`, or `not run`."""
        if not self.ran:
            return Verdict.NOT_RUN
        return Verdict.PASSED if self.passed else Verdict.FAILED

    @classmethod
    def not_run(cls, name: str, why: str) -> Check:
        """A line that says why there is no figure; it does not stand against the model."""
        return cls(name, "-", True, why, "-", ran=False)


@dataclass(frozen=True, slots=True)
class ActivationDiff:
    """How far two models are apart at one place of the arithmetic.

    Attributes:
        name: the Hugging Face module whose output it is.
        layer: global, 0-based; None outside the layers.
        sublayer: embedding, norm, attention, router, mlp, layer, or output layer; of a vision tower: vision embedding,
            norm, attention, mlp, layer, merger, or features, each without a layer.
        difference: the worst position's, relative to the largest entry there.
        bound: what rounding alone can make of it.
    """

    name: str
    layer: int | None
    sublayer: str
    difference: float
    bound: float

    @property
    def parts(self) -> bool:
        """Whether the difference is more than rounding; NaN is."""
        return not self.difference <= self.bound


@dataclass(frozen=True, slots=True)
class Location:
    """The first place where two models part, and what usually causes that."""

    name: str
    layer: int | None
    sublayer: str
    causes: tuple[str, ...]

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return f"hidden states part at {layer}{self.sublayer} ({self.name})"


@dataclass(frozen=True, slots=True)
class Report:
    """The checks of one model at one layout, or of two models against each other.

    Attributes:
        source, other: folders' names; other None: the source's own round trip.
        layout, backend, dtype: of Megatron-Core's side and of the arithmetic.
        model: family, parameters and shape, for people and cards.
        places: differences in the order of the arithmetic.
        tensors: name -> dtype, shape and SHA-256 of the source's tensors.
        setup: prompts, seeds and other settings that the figures depend on.
    """

    source: str
    layout: str
    checks: tuple[Check, ...] = ()
    other: str | None = None
    backend: str = "auto"
    dtype: str = "float32"
    model: Mapping[str, Any] = field(default_factory=dict)
    places: tuple[ActivationDiff, ...] = ()
    location: Location | None = None
    tensors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    setup: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every check that ran holds, and there is at least one."""
        return any(check.ran for check in self.checks) and all(
            check.passed for check in self.checks
        )

    @property
    def parameters(self) -> int:
        """Elements of all tensors of the source."""
        return int(self.model.get("parameters", 0))

    def check(self, name: str) -> Check:
        """The check of that name.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def faults(self) -> str:
        """One line for each check that does not hold, and where it begins."""
        lines = [
            f"{self.source}: {check.name}: {check.figure}; {check.where}"
            for check in self.checks
            if not check.passed
        ]
        if self.location is not None:
            lines += [
                f"{self.source}: {self.location.sublayer}: usual causes: {'; '.join(self.location.causes)}"
            ]
        return "\n".join(lines)

    @property
    def round_trip(self) -> bool:
        """Whether what lies on disk came back: every check but those of the arithmetic holds."""
        return all(
            check.passed for check in self.checks if check.name not in ("logits", "gradients")
        )

    @property
    def max_logit_difference(self) -> float:
        """The largest absolute difference of any logit; NaN where logits were not compared."""
        values = [check.values for check in self.checks if check.name == "logits" and check.ran]
        return float(values[0]["max"]) if values else float("nan")

    @property
    def first_differing_layer(self) -> str:
        """The layer where hidden states part first, or the sublayer where that is in none; `-` where they do not."""
        if self.location is None:
            return "-"
        return self.location.sublayer if self.location.layer is None else str(self.location.layer)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `report.schema.json` beside this file describes it; what is not a number is null."""
        result = {
            "schema": SCHEMA,
            "verdict": (Verdict.PASSED if self.passed else Verdict.FAILED).value,
        }
        result |= {name: getattr(self, name) for name in _PLAIN}
        result["checks"] = [
            {
                "name": check.name,
                "verdict": check.verdict.value,
                "figure": check.figure,
                "bound": check.bound,
                "where": check.where,
                "values": dict(check.values),
            }
            for check in self.checks
        ]
        result["location"] = None if self.location is None else dataclasses.asdict(self.location)
        result["places"] = [
            dataclasses.asdict(place) | {"parts": place.parts} for place in self.places
        ]
        return json.loads(json.dumps(_finite(result)))

    def write_json(self, path: Path) -> None:
        """`to_json`, indented."""
        path.write_text(json.dumps(self.to_json(), indent=2) + "\n")


_PLAIN = (
    "source", "other", "layout", "backend", "dtype", "model", "tensors", "setup", "versions", "command", "seconds",
)  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def versions() -> dict[str, str]:
    """Of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
