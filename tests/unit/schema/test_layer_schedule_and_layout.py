"""The layer schedule in three vocabularies, and the layouts that a model can and cannot be cut into."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exaone_bridge.errors import BridgeError, UnsupportedLayout
from exaone_bridge.schema.layer_schedule import (
    FULL,
    SLIDING,
    layer_types_of,
    megatron_rope,
    megatron_window,
    pattern,
    windows_of,
)
from exaone_bridge.schema.parallel_layout import Layout

# --- schedule ---


def test_the_words_are_transformers_own() -> None:
    assert (FULL, SLIDING) == ("full_attention", "sliding_attention")


def test_windows_of_layer_types() -> None:
    assert windows_of([SLIDING, FULL, SLIDING], 9) == (9, None, 9)
    assert windows_of([FULL, FULL], 9) == (None, None)
    assert windows_of([FULL], None) == (None,)
    assert windows_of([], 9) == ()


@given(slides=st.lists(st.booleans(), max_size=12), window=st.integers(1, 10000))
def test_layer_types_and_windows_are_inverse(slides: list[bool], window: int) -> None:
    kinds = [SLIDING if slide else FULL for slide in slides]
    windows = windows_of(kinds, window)
    assert [here is not None for here in windows] == slides
    assert layer_types_of(windows) == kinds
    assert windows_of(layer_types_of(windows), window) == windows


@pytest.mark.parametrize(
    ("windows", "size", "layers"),
    [
        ((4096, 4096, 4096, None), (4095, 0), [1, 1, 1, 0]),  # W keys, the query's own included
        ((None, 8), (7, 0), [0, 1]),
        ((1, None), (0, 0), [1, 0]),  # the query sees itself only
        ((5, 5), (4, 0), [1, 1]),
        ((None, None), None, None),
        ((), None, None),
    ],
)
def test_megatron_window(windows: tuple[int | None, ...], size: Any, layers: Any) -> None:
    assert megatron_window(windows) == (size, layers)


@given(slides=st.lists(st.booleans(), min_size=1).filter(any), window=st.integers(1, 10000))
def test_megatron_window_can_be_taken_back(slides: list[bool], window: int) -> None:
    windows = tuple(window if slide else None for slide in slides)
    size, layers = megatron_window(windows)
    assert size is not None and layers is not None and size[1] == 0
    assert tuple(size[0] + 1 if slide else None for slide in layers) == windows
    assert all(type(slide) is int for slide in layers)


def test_megatron_has_one_window_size_only() -> None:
    with pytest.raises((ValueError, BridgeError)):
        megatron_window((4, 8, None))


@pytest.mark.parametrize(
    ("rope", "listed"),
    [
        ((True, True, True, False), [0, 0, 0, 1]),  # 1 means no RoPE
        ((False, True), [1, 0]),
        ((False, False), [1, 1]),
        ((True, True), None),
        ((), None),
    ],
)
def test_megatron_rope(rope: tuple[bool, ...], listed: list[int] | None) -> None:
    found = megatron_rope(rope)
    assert found == listed
    assert found is None or all(type(none) is int for none in found)


def test_pattern() -> None:
    assert pattern((8, 8, 8, None)) == "LLLG"
    assert pattern((None, 8)) == "GL"
    assert pattern(()) == ""


# --- layout ---


def layout_refusal(what: str, got: str, wanted: str, make: Any) -> str:
    with pytest.raises(UnsupportedLayout) as caught:
        make()
    message = str(caught.value)
    assert type(caught.value) is UnsupportedLayout
    assert message.startswith(f"parallel layout: {what} is {got}, and must be {wanted}; ")
    assert len(message.splitlines()) == 1 and message.endswith(".")
    return message


@pytest.mark.parametrize("name", ["tp", "pp", "vpp"])
@pytest.mark.parametrize("size", [0, -2])
def test_refused_sizes(name: str, size: int) -> None:
    message = layout_refusal(name, str(size), "at least 1", lambda: Layout(**{name: size}))
    assert f"--{name}" in message


def test_refused_virtual_stages_without_a_pipeline() -> None:
    assert "--pp" in layout_refusal("vpp", "2", "1 where pp is 1", lambda: Layout(tp=2, vpp=2))


def test_refused_sequence_parallelism_without_tensor_parallelism() -> None:
    assert "--tp" in layout_refusal("sp", "on", "off where tp is 1", lambda: Layout(pp=2, sp=True))


MODEL = {"layers": 8, "heads": 4, "kv_heads": 2, "ffn": 96}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        Layout(tp=4),  # twice the key-value heads: each is held by two ranks
        Layout(tp=4, sp=True),
        Layout(pp=2),
        Layout(pp=8),
        Layout(pp=2, vpp=4),
        Layout(pp=4, vpp=2),
        Layout(tp=2, pp=4, vpp=2, sp=True),
    ],
    ids=str,
)
def test_layouts_that_cut_evenly(layout: Layout) -> None:
    layout.check(**MODEL)


@pytest.mark.parametrize(
    ("tp", "change"),
    [
        (3, {}),  # neither heads nor key-value heads
        (3, {"kv_heads": 3}),  # heads
        (8, {}),  # more ranks than heads
        (2, {"ffn": 95}),
        (4, {"ffn": 98}),
    ],
)
def test_refused_tensor_parallelism(tp: int, change: dict[str, int]) -> None:
    model = MODEL | change
    wanted = (
        f"a divisor of {model['heads']} attention heads and of feed-forward width {model['ffn']}"
    )
    assert "--tp" in layout_refusal("tp", str(tp), wanted, lambda: Layout(tp=tp).check(**model))


@pytest.mark.parametrize(("tp", "heads", "kv_heads"), [(4, 12, 6), (6, 12, 4), (2, 6, 3)])
def test_refused_key_value_heads(tp: int, heads: int, kv_heads: int) -> None:
    wanted = f"a divisor or a multiple of {kv_heads} key-value heads"
    model = {"layers": 1, "heads": heads, "kv_heads": kv_heads, "ffn": 12}
    assert "--tp" in layout_refusal("tp", str(tp), wanted, lambda: Layout(tp=tp).check(**model))


@pytest.mark.parametrize(("tp", "kv_heads"), [(4, 1), (4, 2), (4, 4), (4, 12), (12, 6), (6, 12)])
def test_key_value_heads_may_be_fewer_than_ranks(tp: int, kv_heads: int) -> None:
    Layout(tp=tp).check(layers=1, heads=12, kv_heads=kv_heads, ffn=12)


@pytest.mark.parametrize(
    ("pp", "vpp", "layers"), [(3, 1, 8), (16, 1, 8), (2, 3, 8), (4, 4, 8), (2, 2, 30)]
)
def test_refused_pipelines(pp: int, vpp: int, layers: int) -> None:
    wanted, layout = f"a divisor of {layers} layers", Layout(pp=pp, vpp=vpp)
    message = layout_refusal(
        "pp x vpp", f"{pp} x {vpp}", wanted, lambda: layout.check(**MODEL | {"layers": layers})
    )
    assert "--pp" in message and "--vpp" in message


def test_ranks() -> None:
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
def test_str(layout: Layout, text: str) -> None:
    assert str(layout) == text
