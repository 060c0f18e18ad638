"""Rates: who may ask how often.

One limiter serves REST and the socket, so that nobody gets twice the rate by using both.

The generic cell rate algorithm (ITU-T I.371, the leaky bucket as a meter): one number per bucket, the time at which it
would be full again. Pure: the time comes in with each question.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

# Buckets remembered: about 200 bytes each. A bucket that is full again equals one that was never used and is dropped
# first; beyond that the one unused for longest goes.
BUCKETS_MAX: Final = 100_000
# A bucket that is used by less than this share is not worth telling other nodes: most credentials never get there.
SHARED_FROM: Final = 0.05
# Other nodes' use may empty a bucket beyond empty, by at most this many times its depth: who bursts on several nodes at
# once waits for it afterwards.
DEBT_MAX: Final = 1.0
# Full buckets looked for whenever the bound is reached, so that the cost of one question stays bounded.
_SWEEP: Final = 64


# Whose bucket: the app's number and the credential, `user:alice` or `key:k1`.
Key: TypeAlias = tuple[int, str]


@dataclass(slots=True, frozen=True)
class Rate:
    """`per_second` over time, `burst` at once."""

    per_second: float
    burst: int

    @property
    def window_seconds(self) -> int:
        """How long an empty bucket takes to fill, rounded up."""
        return max(1, math.ceil(self.burst / self.per_second))


class Verdict(msgspec.Struct, frozen=True):
    """`remaining` whole units are left; all of them are back in `reset_seconds`; 0 ≤ `retry_after_ms` until `cost`
    units are there, 0 when allowed."""

    allowed: bool
    remaining: int
    reset_seconds: int
    retry_after_ms: int


class Limiter:
    """Buckets of one rate, by key.

    `shared`: other nodes let through on the same keys. Then each tells the others what it has taken (`take_usage`), and
    takes what they tell from its own buckets (`charge`).
    """

    __slots__ = ("_depth", "_full_at", "_max", "_step", "_usage", "rate")

    def __init__(self, rate: Rate, buckets_max: int = BUCKETS_MAX, *, shared: bool = False) -> None:
        self.rate = rate
        self._step = 1.0 / rate.per_second
        self._depth = rate.burst * self._step
        self._max = buckets_max
        # When each bucket is full again, in the caller's seconds.
        self._full_at: OrderedDict[Key, float] = OrderedDict()
        # Units taken here that nobody was told of. None where there is nobody to tell.
        self._usage: dict[Key, float] | None = {} if shared else None

    def take(self, key: Key, now: float, cost: float = 1.0) -> Verdict:
        """Take `cost` units from the bucket at `now` (monotonic seconds), or refuse and take nothing."""
        full_at = self._full_at.get(key, now)
        if full_at < now:
            full_at = now
        after = full_at + cost * self._step
        # A millionth of a unit: sums of steps are not exact.
        over = after - now - self._depth
        if over > self._step * 1e-6:
            return Verdict(
                False, max(0, int((self._depth - (full_at - now)) / self._step + 1e-6)), math.ceil(full_at - now),
                max(1, math.ceil(over * 1000)),
            )  # fmt: skip
        self._full_at[key] = after
        self._full_at.move_to_end(key)
        if len(self._full_at) > self._max:
            self._drop(now)
        if self._usage is not None:
            self._usage[key] = self._usage.get(key, 0.0) + cost
        return Verdict(True, int((self._depth - (after - now)) / self._step + 1e-6), math.ceil(after - now), 0)

    def take_usage(self, now: float) -> list[tuple[Key, float]]:
        """What was taken since the last call, of buckets that are used enough to be worth telling."""
        usage = self._usage
        if not usage:
            return []
        taken = []
        for key, units in list(usage.items()):
            used = self._full_at.get(key, now) - now
            if used >= self._depth * SHARED_FROM:
                taken.append((key, units))
                del usage[key]
            elif used <= 0:
                # Full again: it is as if nothing had been taken.
                del usage[key]
        return taken

    def charge(self, key: Key, units: float, now: float) -> None:
        """Another node has let `units` through: take them here, too, into debt if need be."""
        full_at = max(now, self._full_at.get(key, now)) + units * self._step
        self._full_at[key] = min(full_at, now + self._depth * (1 + DEBT_MAX))
        self._full_at.move_to_end(key)
        if len(self._full_at) > self._max:
            self._drop(now)

    def __len__(self) -> int:
        return len(self._full_at)

    def _drop(self, now: float) -> None:
        for _ in range(_SWEEP):
            key, full_at = self._full_at.popitem(last=False)
            if full_at > now:
                # Still in use, but unused for longest of those that are left: it goes only if the bound says so.
                if len(self._full_at) < self._max:
                    self._full_at[key] = full_at
                    self._full_at.move_to_end(key, last=False)
                return
            if not self._full_at:
                return
