"""Data types in safetensors' names and as torch dtypes, and the bytes of a tensor.

`schema/dtypes.py` has what needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["SAFETENSORS_NAMES", "TORCH_DTYPES", "byte_view"]

# Name in a safetensors header -> torch dtype.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

# torch dtype -> name in a safetensors header.
SAFETENSORS_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor of any shape [...], without a copy."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())
