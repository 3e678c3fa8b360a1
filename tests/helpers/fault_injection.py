"""Faults to plant, for tests: in a bridge's table of rows, and in the model that has been loaded.

Ranks are forked from the test's process and inherit what is planted there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exaone_bridge.schema.parallel_layout import Layout
from exaone_bridge.schema.param_mapping import ParamMapping
from exaone_bridge.verification.workflow.verify import verify

Plant = Callable[[pytest.MonkeyPatch], None]


def mappings_with(bridge: str, change: Callable[[ParamMapping], ParamMapping | None]) -> Plant:
    """The rows of this bridge (`module:class`), each changed, or dropped where the change is None."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        module, _, name = bridge.partition(":")
        found = getattr(importlib.import_module(module), name)
        family = found.FAMILY
        faulty = dataclasses.replace(
            family,
            mappings=lambda model_config: tuple(
                mapping
                for mapping in map(change, family.mappings(model_config))
                if mapping is not None
            ),
        )
        patch.setattr(found, "FAMILY", faulty)

    return plant


def provider_with(bridge: str, change: Callable[..., Any]) -> Plant:
    """This bridge's provider, made by `change(right, facts, hf_config)`, where `right` makes what it should be."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        module, _, name = bridge.partition(":")
        found = getattr(importlib.import_module(module), name)
        patch.setattr(
            found, "provider_of", staticmethod(functools.partial(change, found.provider_of))
        )

    return plant


def build_with(change: Callable[[Any], None]) -> Plant:
    """The model as it is built and loaded, then changed in place."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        import exaone_bridge.runtime.model as module

        build = module.build

        def faulty(*args: Any, **kwargs: Any) -> Any:
            model = build(*args, **kwargs)
            with torch.no_grad():
                change(model)
            return model

        patch.setattr(module, "build", faulty)

    return plant


def assert_caught(folder: Path, layer: int) -> None:
    """The logits tell, by ten times the tolerance at least, and the first wrong layer is this one."""
    report = verify(folder, Layout())
    assert not report.passed
    assert not next(check for check in report.checks if check.name == "logits").passed
    assert report.max_logit_difference > 1e-3  # no fault hides near the tolerance
    assert report.first_diverging_layer == str(layer)
