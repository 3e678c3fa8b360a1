"""The layer schedule: which layers have a sliding window, RoPE, or experts. No torch.

It is converted between Transformers' names, the model config's, and Megatron-Core's. All count
layers from 0 over all pipeline stages; Megatron-Core reads its per-layer lists at
`layer_number - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "FULL",
    "SLIDING",
    "attention_pattern",
    "layer_types_of",
    "megatron_rope",
    "megatron_window",
    "mlp_pattern",
    "windows_of",
]

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Returns for each layer the keys that a query attends to, with its own; None: all before it.

    Args:
        layer_types: Transformers' `layer_types`.
        window: Transformers' `sliding_window`.
    """
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def layer_types_of(windows: Sequence[int | None]) -> list[str]:
    """Returns Transformers' `layer_types` for these windows."""
    return [FULL if window is None else SLIDING for window in windows]


def megatron_window(
    windows: Sequence[int | None],
) -> tuple[tuple[int, int] | None, list[int] | None]:
    """Returns Megatron-Core's `window_size` and `window_attn_skip_freq` for these windows.

    `window_size` counts the keys to the left and to the right of the query. A window of W keys
    includes the query's own, so W - 1 are to its left. In `window_attn_skip_freq` 1 means a window.
    """
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return None, None
    (size,) = sizes
    return (size - 1, 0), [int(window is not None) for window in windows]


def megatron_rope(rope: Sequence[bool]) -> list[int] | None:
    """Returns Megatron-Core's `no_rope_freq` (1: no RoPE); None where RoPE is on every layer."""
    return None if all(rope) else [int(not applied) for applied in rope]


def attention_pattern(windows: Sequence[int | None]) -> str:
    """Returns one letter for each layer (`LLLG`): L sliding-window attention, G full attention."""
    return "".join("G" if window is None else "L" for window in windows)


def mlp_pattern(moe_layer_mask: Sequence[bool]) -> str:
    """Returns one letter for each layer (`DEEE`): D a dense MLP, E a mixture of experts."""
    return "".join("E" if is_moe else "D" for is_moe in moe_layer_mask)
