"""The options of a verification. No torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["VerifyOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What a verification compares; `exaone_bridge.verify` documents each option.

    `exaone_bridge.verify` compares generation by default, these options do not.
    """

    backend: str = "auto"
    dtype: str = "float32"
    count: int = 3
    length: int | None = None
    seed: int = 0
    generation: bool = False
    gradients: bool = False
    mtp: bool = False
    stream: bool | None = None
