"""The summary of a conversion, its memory, and the distribution of its work. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Summary", "balanced", "largest_growth", "memory_used"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion has written.

    Attributes:
        tensors: Number of Hugging Face tensors.
        nbytes: Their bytes.
        seconds: From start to rename; 0 for a dry run.
        peak_bytes: Peak memory of the process that grew most while it wrote.
        base_bytes: Memory of that process before it began.
        kept_bytes: Bytes of tensors that an earlier run had written.
        notes: Sentences on what was chosen, and on what the output lacks.
    """

    tensors: int
    nbytes: int
    seconds: float
    peak_bytes: int = 0
    base_bytes: int = 0
    kept_bytes: int = 0
    notes: tuple[str, ...] = ()


def balanced(sizes: list[int], num_bins: int) -> list[list[int]]:
    """Distribute items over bins of similar total size, greedily.

    Returns:
        The indices in each bin, in order.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        smallest = totals.index(min(totals))
        bins[smallest].append(index)
        totals[smallest] += sizes[index]
    return [sorted(indices) for indices in bins]


def largest_growth(processes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the (base, peak) memory of the process whose memory grew most."""
    return max(processes, key=lambda memory: memory[1] - memory[0])


def memory_used(*, peak: bool = False) -> int:
    """Return the bytes of memory of this process, now or at most; 0 where there is no /proc."""
    field = "VmHWM:" if peak else "VmRSS:"
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return 0
