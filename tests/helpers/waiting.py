"""Finds operations for which a CPU would wait for its GPU, while a model runs on the CPU.

CUDA graphs cannot capture them, and without graphs they empty the queue of launched kernels.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Python's view of a tensor's values, and tensors made of Python's values.
_CALLS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
_MAKERS = {"tensor", "as_tensor"}
# Operators whose result has a shape or a value that depends on values.
_OPERATORS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
}


def _place() -> str:
    """Return the file and function that called torch: `exaone_bridge/modules/router.py:gating`."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        package = next((n for n in ("exaone_bridge", "megatron") if n in path.parts), None)
        if package is not None:
            parts = path.parts[::-1]
            inner = path.parts[len(parts) - 1 - parts.index(package) :]
            # The CPU's stand-in for CUDA is not part of a run on a GPU.
            if inner[-2:] != ("runtime", "cpu.py"):
                return f"{'/'.join(inner)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class _Calls(TorchFunctionMode):
    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        makes = name in _MAKERS and (kwargs or {}).get("device") not in (None, "cpu")
        if name in _CALLS or makes:
            self.found.add(_place())
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        waits = name in _OPERATORS or (name == "repeat_interleave" and "output_size" not in kwargs)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype is torch.bool]
            # One value is written by masked_fill.
            waits = bool(masks) and not (len(args) > 2 and args[2].numel() == 1)
        if waits:
            self.found.add(_place())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def places_that_wait() -> Iterator[set[str]]:
    """Collect the places that would wait: `exaone_bridge/modules/attention.py:forward`."""
    found: set[str] = set()
    with _Operators(found), _Calls(found):
        yield found
