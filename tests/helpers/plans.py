"""Reshard plans of the tiny models."""

from __future__ import annotations

from typing import Any

from exaone_bridge.checkpoint.reshard.plan import (
    ReshardPlan,
    check_layout,
    reshard_plan,
)
from exaone_bridge.models import FAMILIES
from exaone_bridge.schema.parallel_layout import Layout

TINY = {name: (family, config) for family in FAMILIES for name, config in family.tiny.items()}


def planned(
    name: str, layout: Layout, **fields: Any
) -> tuple[ReshardPlan, dict[str, tuple[int, ...]]]:
    family, config = TINY[name]
    model = family.describe({**config, **fields})
    check_layout(model.config, layout)
    return reshard_plan(model, layout), model.hf_shapes
