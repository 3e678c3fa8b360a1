"""The layer schedule: what each layer attends to, in Hugging Face's words, ours and Megatron-Core's.

Everything here counts layers from 0, globally (over all pipeline stages); so do Megatron-Core's per-layer
lists, which it reads at `layer_number - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "FULL",
    "SLIDING",
    "layer_types_of",
    "megatron_rope",
    "megatron_window",
    "mlp_pattern",
    "pattern",
    "windows_of",
]

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Per layer the number of keys that a query sees, its own included; None = all before it."""
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def layer_types_of(windows: Sequence[int | None]) -> list[str]:
    """Hugging Face's `layer_types` for these windows."""
    return [FULL if window is None else SLIDING for window in windows]


def megatron_window(
    windows: Sequence[int | None],
) -> tuple[tuple[int, int] | None, list[int] | None]:
    """Megatron-Core's `window_size` (keys to the left, keys to the right) and `window_attn_skip_freq` (1 = window).

    A window of W keys includes the query's own, so W - 1 lie to its left.
    """
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return None, None
    (size,) = sizes
    return (size - 1, 0), [int(window is not None) for window in windows]


def megatron_rope(rope: Sequence[bool]) -> list[int] | None:
    """Megatron-Core's `no_rope_freq` (1 = no RoPE), or None where every layer has RoPE."""
    return None if all(rope) else [int(not has) for has in rope]


def pattern(windows: Sequence[int | None]) -> str:
    """`LLLG`: one letter a layer, L local (windowed), G global."""
    return "".join("G" if window is None else "L" for window in windows)


def mlp_pattern(moe: Sequence[bool]) -> str:
    """`DEEE`: one letter a layer, D a dense feed-forward, E experts."""
    return "".join("E" if here else "D" for here in moe)
