"""The layer schedule in the forms of Transformers and of Megatron-Core."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exaone_bridge.errors import BridgeError
from exaone_bridge.schema.layer_schedule import (
    FULL,
    SLIDING,
    attention_pattern,
    layer_types_of,
    megatron_rope,
    megatron_window,
    window_pattern,
    windows_of,
)


def test_layer_types_have_the_names_of_transformers() -> None:
    assert (FULL, SLIDING) == ("full_attention", "sliding_attention")


def test_windows_of_layer_types() -> None:
    assert windows_of([SLIDING, FULL, SLIDING], 9) == (9, None, 9)
    assert windows_of([FULL, FULL], 9) == (None, None)
    assert windows_of([FULL], None) == (None,)
    assert windows_of([], 9) == ()


@given(sliding=st.lists(st.booleans(), max_size=12), window=st.integers(1, 10000))
def test_layer_types_and_windows_are_inverse(sliding: list[bool], window: int) -> None:
    kinds = [SLIDING if is_sliding else FULL for is_sliding in sliding]
    windows = windows_of(kinds, window)
    assert [layer is not None for layer in windows] == sliding
    assert layer_types_of(windows) == kinds
    assert windows_of(layer_types_of(windows), window) == windows


@pytest.mark.parametrize(
    ("windows", "size", "layers"),
    [
        (
            (4096, 4096, 4096, None),
            (4095, 0),
            [1, 1, 1, 0],
        ),  # W keys include the query's own position
        ((None, 8), (7, 0), [0, 1]),
        ((1, None), (0, 0), [1, 0]),  # attention to the query's own position only
        ((5, 5), (4, 0), [1, 1]),
        ((None, None), None, None),
        ((), None, None),
    ],
)
def test_megatron_window(windows: tuple[int | None, ...], size: Any, layers: Any) -> None:
    assert megatron_window(windows) == (size, layers)


@given(sliding=st.lists(st.booleans(), min_size=1).filter(any), window=st.integers(1, 10000))
def test_megatron_window_round_trips(sliding: list[bool], window: int) -> None:
    windows = tuple(window if is_sliding else None for is_sliding in sliding)
    size, layers = megatron_window(windows)
    assert size is not None and layers is not None and size[1] == 0
    assert tuple(size[0] + 1 if is_sliding else None for is_sliding in layers) == windows
    assert all(type(is_sliding) is int for is_sliding in layers)


def test_megatron_window_of_two_sizes_raises() -> None:
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
    assert found is None or all(type(value) is int for value in found)


def test_pattern() -> None:
    assert attention_pattern((8, 8, 8, None)) == "LLLG"
    assert attention_pattern((None, 8)) == "GL"
    assert attention_pattern(()) == ""


@pytest.mark.parametrize(
    ("letters", "pattern"),
    [("LLLGLLLG", "LLLG"), ("LLLGLL", "LLLG"), ("GLLLLG", "GLLLL"), ("LL", "L"), ("GG", None)],
)
def test_window_pattern_is_what_repeats(letters: str, pattern: str | None) -> None:
    windows = [7 if letter == "L" else None for letter in letters]
    assert window_pattern(windows) == pattern
