"""The layouts that a model supports, and the errors of the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from exaone_bridge.errors import UnsupportedLayout
from exaone_bridge.schema.parallel_layout import Layout


def layout_error(what: str, got: str, wanted: str, make: Callable[[], object]) -> str:
    with pytest.raises(UnsupportedLayout) as raised:
        make()
    message = str(raised.value)
    assert type(raised.value) is UnsupportedLayout
    assert message.startswith(f"parallel layout: {what} is {got}, and must be {wanted}; ")
    assert len(message.splitlines()) == 1 and message.endswith(".")
    return message


@pytest.mark.parametrize("name", ["tp", "pp", "vpp"])
@pytest.mark.parametrize("size", [0, -2])
def test_size_below_one_raises(name: str, size: int) -> None:
    message = layout_error(name, str(size), "at least 1", lambda: Layout(**{name: size}))
    assert f"--{name}" in message


def test_virtual_stages_without_a_pipeline_raise() -> None:
    assert "--pp" in layout_error("vpp", "2", "1 where pp is 1", lambda: Layout(tp=2, vpp=2))


def test_sequence_parallelism_without_tensor_parallelism_raises() -> None:
    assert "--tp" in layout_error("sp", "on", "off where tp is 1", lambda: Layout(pp=2, sp=True))


MODEL = {"layers": 8, "heads": 4, "kv_heads": 2, "ffn": 96}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        Layout(tp=4),  # twice the KV heads: two ranks have the same one
        Layout(tp=4, sp=True),
        Layout(pp=2),
        Layout(pp=8),
        Layout(pp=2, vpp=4),
        Layout(pp=4, vpp=2),
        Layout(tp=2, pp=4, vpp=2, sp=True),
    ],
    ids=str,
)
def test_layout_that_divides_the_model_passes(layout: Layout) -> None:
    layout.check(**MODEL)


@pytest.mark.parametrize(
    ("tp", "change"),
    [
        (3, {}),  # divides neither heads nor KV heads
        (3, {"kv_heads": 3}),  # does not divide heads
        (8, {}),  # more ranks than heads
        (2, {"ffn": 95}),
        (4, {"ffn": 98}),
    ],
)
def test_tp_that_does_not_divide_heads_or_ffn_raises(tp: int, change: dict[str, int]) -> None:
    model = MODEL | change
    wanted = (
        f"a divisor of {model['heads']} attention heads and of feed-forward size {model['ffn']}"
    )
    assert "--tp" in layout_error("tp", str(tp), wanted, lambda: Layout(tp=tp).check(**model))


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(4, 12, 6), (6, 12, 4), (2, 6, 3)])
def test_tp_that_does_not_fit_the_kv_heads_raises(tp: int, heads: int, kv_heads: int) -> None:
    wanted = f"a divisor or a multiple of {kv_heads} KV heads"
    model = {"layers": 1, "heads": heads, "kv_heads": kv_heads, "ffn": 12}
    assert "--tp" in layout_error("tp", str(tp), wanted, lambda: Layout(tp=tp).check(**model))


@pytest.mark.parametrize(("tp", "kv_heads"), [(4, 1), (4, 2), (4, 4), (4, 12), (12, 6), (6, 12)])
def test_tp_that_divides_or_is_a_multiple_of_the_kv_heads_passes(tp: int, kv_heads: int) -> None:
    Layout(tp=tp).check(layers=1, heads=12, kv_heads=kv_heads, ffn=12)


@pytest.mark.parametrize(
    ("pp", "vpp", "layers"), [(3, 1, 8), (16, 1, 8), (2, 3, 8), (4, 4, 8), (2, 2, 30)]
)
def test_pipeline_that_does_not_divide_the_layers_raises(pp: int, vpp: int, layers: int) -> None:
    wanted, layout = f"a divisor of {layers} layers", Layout(pp=pp, vpp=vpp)
    message = layout_error(
        "pp x vpp", f"{pp} x {vpp}", wanted, lambda: layout.check(**MODEL | {"layers": layers})
    )
    assert "--pp" in message and "--vpp" in message


def test_ranks_are_tp_times_pp() -> None:
    assert [Layout().ranks, Layout(tp=3, pp=5).ranks, Layout(tp=2, pp=2, vpp=7).ranks] == [1, 15, 4]


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (Layout(), "TP1 x PP1"),
        (Layout(tp=2, pp=4), "TP2 x PP4"),
        (Layout(pp=2, vpp=3), "TP1 x PP2 x VPP3"),
        (Layout(tp=2, sp=True), "TP2 x PP1 + SP"),
        (Layout(tp=8, pp=2, vpp=2, sp=True), "TP8 x PP2 x VPP2 + SP"),
    ],
)
def test_layout_prints_its_axes(layout: Layout, text: str) -> None:
    assert str(layout) == text
