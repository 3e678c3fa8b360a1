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
    "moe_layer_mask_of",
    "rope_of",
    "window_pattern",
    "windows_of",
    "windows_of_megatron",
]

FULL, SLIDING = "full_attention", "sliding_attention"


def windows_of(layer_types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """Return for each layer the keys that a query attends to, with its own; None: all before it.

    Args:
        layer_types: Transformers' `layer_types`.
        window: Transformers' `sliding_window`.
    """
    return tuple(window if kind == SLIDING else None for kind in layer_types)


def layer_types_of(windows: Sequence[int | None]) -> list[str]:
    """Return Transformers' `layer_types` for these windows."""
    return [FULL if window is None else SLIDING for window in windows]


def megatron_window(
    windows: Sequence[int | None],
) -> tuple[tuple[int, int] | None, list[int] | None]:
    """Return Megatron-Core's `window_size` and `window_attn_skip_freq` for these windows.

    `window_size` counts the keys to the left and to the right of the query. A window of W keys
    includes the query's own, so W - 1 are to its left. In `window_attn_skip_freq` 1 means a window.
    """
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return None, None
    (size,) = sizes
    return (size - 1, 0), [int(window is not None) for window in windows]


def megatron_rope(rope: Sequence[bool]) -> list[int] | None:
    """Return Megatron-Core's `no_rope_freq` (1: no RoPE); None where RoPE is on every layer."""
    return None if all(rope) else [int(not applied) for applied in rope]


def windows_of_megatron(
    window_size: Sequence[int] | None, layer_mask: Sequence[int] | None, layers: int
) -> tuple[int | None, ...]:
    """Return the inverse of `megatron_window`; without a list every layer has the window.

    Args:
        window_size: the provider's `window_size`.
        layer_mask: its `window_attn_skip_freq`.
        layers: its `num_layers`.
    """
    window = None if window_size is None else window_size[0] + 1
    return tuple(window if has_window else None for has_window in layer_mask or [1] * layers)


def rope_of(no_rope: Sequence[int] | None, layers: int) -> tuple[bool, ...]:
    """Return the inverse of `megatron_rope` for a model of so many layers."""
    return tuple(not without for without in no_rope or [0] * layers)


def moe_layer_mask_of(
    freq: int | Sequence[int], layers: int, num_experts: int | None
) -> tuple[bool, ...]:
    """Return for each layer whether it is an MoE layer.

    Args:
        freq: Megatron-Core's `moe_layer_freq`: every n-th layer from the first, or a flag for each.
        layers: `num_layers`.
        num_experts: `num_moe_experts`; without any, no layer is.
    """
    if not num_experts:
        return (False,) * layers
    if isinstance(freq, int):
        return tuple(layer % freq == 0 for layer in range(layers))
    return tuple(bool(is_moe) for is_moe in freq)


def attention_pattern(windows: Sequence[int | None]) -> str:
    """Return one letter for each layer (`LLLG`): L sliding-window attention, G full attention."""
    return "".join("G" if window is None else "L" for window in windows)


def window_pattern(windows: Sequence[int | None]) -> str | None:
    """Return `sliding_window_pattern` as publishers write it: the letters that repeat, or None."""
    letters = attention_pattern(windows)
    if "L" not in letters:
        return None
    repeats = (letters[:size] * len(letters) for size in range(1, len(letters) + 1))
    size = next(n for n, text in enumerate(repeats, 1) if text.startswith(letters))
    return letters[:size]


def mlp_pattern(moe_layer_mask: Sequence[bool]) -> str:
    """Return one letter for each layer (`DEEE`): D a dense MLP, E a mixture of experts."""
    return "".join("E" if is_moe else "D" for is_moe in moe_layer_mask)
