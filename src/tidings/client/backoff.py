"""How long to wait before the next attempt."""

from __future__ import annotations

import random

# The first retry comes within half a second, on average after a quarter: a blip is over before anyone looks.
BACKOFF_BASE_SECONDS = 0.5
# A server that was away for minutes is asked twice a minute by each client, spread evenly over the time.
BACKOFF_CAP_SECONDS = 30.0
# A connection that lived this long was a good one: the next failure starts from the base again.
# Shorter ones count on, so that a server which accepts and drops is not hammered.
STABLE_AFTER_SECONDS = 5.0


class FullJitter:
    """Exponential back-off with full jitter: uniform in [0, min(cap, base * 2**attempt)] seconds.

    Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: of the variants compared, full jitter
    has the fewest calls in total and spreads a crowd of clients best.
    """

    __slots__ = ("_base", "_cap", "_random", "attempt")

    def __init__(
        self,
        *,
        base: float = BACKOFF_BASE_SECONDS,
        cap: float = BACKOFF_CAP_SECONDS,
        random: random.Random,
    ) -> None:
        self._base = base
        self._cap = cap
        self._random = random
        self.attempt = 0

    def bound(self) -> float:
        """The longest that `next` may answer now, in seconds."""
        # 2**40 base is beyond any cap: the exponent is bounded so that the number stays a small float.
        return min(self._cap, self._base * 2.0 ** min(self.attempt, 40))

    def next(self) -> float:
        """Seconds to wait before the next attempt; every call counts as one more failure."""
        delay = self._random.uniform(0.0, self.bound())
        self.attempt += 1
        return delay

    def reset(self) -> None:
        """All is well: the next failure is the first one again."""
        self.attempt = 0
