"""Ranges of seqs with holes."""

from __future__ import annotations

from collections.abc import Iterator

NEVER = float("inf")


def without(first: int, last: int, away: list[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """The parts of first..last (ends included) outside the ascending ranges `away`."""
    start = first
    for low, high in away:
        if high < start:
            continue
        if low > last:
            break
        if start < low:
            yield start, int(low) - 1
        if high == NEVER:
            return
        start = max(start, int(high) + 1)
    if start <= last:
        yield start, last
