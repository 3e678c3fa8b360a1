"""ERNIE 4.5 against Transformers: every position's logits, a bitwise round trip, at every configuration and layout."""

from __future__ import annotations

from typing import Any

import pytest

from exaone_bridge.schema.parallel_layout import Layout
from tests.helpers.ernie45_cases import CONFIGURATIONS, EXPERT_LAYOUTS, LAYOUTS, MOE_NAMES, NAMES
from tests.helpers.parity import assert_passes

pytestmark = pytest.mark.usefixtures("references")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(megatron_bridge: Any, tiny: Any, name: str, layout: Layout) -> None:
    """The vocabulary, 387, is one that every tp has to pad."""
    assert_passes(tiny(name), layout)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MOE_NAMES)
def test_expert_layouts(megatron_bridge: Any, tiny: Any, name: str, layout: Layout) -> None:
    assert_passes(tiny(name), layout)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_configurations(megatron_bridge: Any, tiny: Any, case: str) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), Layout())


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("biases, tied", Layout(tp=2, pp=2)),
        ("biases, tied", Layout(tp=2, ep=2, sp=True)),
        ("biases, untied, no shared expert", Layout(tp=2)),
        ("dense, biases", Layout(tp=2)),
        ("bfloat16 on disk", Layout(tp=2, ep=2)),
        ("bfloat16 on disk", Layout(pp=2)),
        ("no layer has experts", Layout(tp=2, pp=2)),
        ("interval of three", Layout(pp=4)),
    ],
    ids=lambda value: str(value),
)
def test_configurations_in_parallel(
    megatron_bridge: Any, tiny: Any, case: str, layout: Layout
) -> None:
    name, fields = CONFIGURATIONS[case]
    assert_passes(tiny(name, **fields), layout)
