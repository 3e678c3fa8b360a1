"""What a conversion says of itself while it runs and when it has ended. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Summary", "deal", "peak_memory", "resident_memory"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion moved.

    Attributes:
        tensors, nbytes: of the Hugging Face side.
        seconds: from start to rename; 0 for a dry run.
        peak_bytes: the most memory that any of its processes held while it moved tensors.
        base_bytes: what that process held before it began.
        kept_bytes: those that an earlier run had written.
    """

    tensors: int
    nbytes: int
    seconds: float
    peak_bytes: int = 0
    base_bytes: int = 0
    kept_bytes: int = 0


def deal(sizes: list[int], hands: int) -> list[list[int]]:
    """Numbers of things, dealt out so that each hand's sizes add up to about the same; in order within a hand."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    total = [0] * hands
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        least = total.index(min(total))
        dealt[least].append(number)
        total[least] += sizes[number]
    return [sorted(hand) for hand in dealt]


def _status(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return 0


def resident_memory() -> int:
    """Bytes that this process holds in memory now."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The most bytes that this process has held."""
    return _status("VmHWM")
