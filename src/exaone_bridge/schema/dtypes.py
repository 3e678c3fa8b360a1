"""Names and sizes of data types, without torch: config.json, safetensors headers, Megatron-Core.

A config names a type as torch does ("bfloat16"); a safetensors header has its own name ("BF16").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = [
    "CONFIG_DTYPES",
    "DTYPE_ALIASES",
    "DTYPE_BYTES",
    "MODEL_DTYPES",
    "SAFETENSORS_DTYPES",
    "itemsize",
]

# Name in config.json -> name in a safetensors header, for the types that a model may have.
SAFETENSORS_DTYPES: Final[Mapping[str, str]] = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
}
# The inverse.
CONFIG_DTYPES: Final[Mapping[str, str]] = {
    safetensors: config for config, safetensors in SAFETENSORS_DTYPES.items()
}
MODEL_DTYPES: Final = tuple(SAFETENSORS_DTYPES)
# Other names of these types, as Megatron and torch have them -> name in config.json.
DTYPE_ALIASES: Final[Mapping[str, str]] = {
    "fp32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}

# Name in a safetensors header -> bytes per element, in the order of safetensors' own enum, by which
# its writer sorts. The other types of safetensors (complex, MX scales, floats of less than a byte)
# are rejected: no supported model has them.
DTYPE_BYTES: Final[Mapping[str, int]] = (
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1)
    | dict.fromkeys(("I16", "U16", "F16", "BF16"), 2)
    | dict.fromkeys(("I32", "U32", "F32"), 4)
    | dict.fromkeys(("F64", "I64", "U64"), 8)
)


def itemsize(dtype: str) -> int:
    """Return the bytes per element of a type named as in config.json."""
    return DTYPE_BYTES[SAFETENSORS_DTYPES[dtype]]
