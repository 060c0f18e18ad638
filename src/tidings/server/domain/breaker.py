"""A circuit breaker: who does not answer is left alone for a while (Nygard, Release It!, chapter 5). Pure: time is
given."""

from __future__ import annotations

from typing import Final

# Failures in a row after which nobody is asked.
FAILURES_MAX: Final = 5
# How long at first, and at the most, seconds: doubled each time a probe fails.
FIRST_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 60.0


class Breaker:
    """Closed: everybody may ask. Open: nobody, until its time is over; then one probe decides."""

    __slots__ = ("_failures", "_opened_until", "_probing", "_wait")

    def __init__(self) -> None:
        self._failures = 0
        self._wait = FIRST_SECONDS
        self._opened_until: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether it has tripped and no probe has succeeded since."""
        return self._opened_until is not None

    def may_ask(self, now: float) -> bool:
        """Whether to ask now. Who is told so says how it went: `succeeded`, `failed` or `gave_up`."""
        if self._opened_until is None:
            return True
        if now < self._opened_until or self._probing:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """There was an answer, whatever it said."""
        self._failures = 0
        self._wait = FIRST_SECONDS
        self._opened_until = None
        self._probing = False

    def failed(self, now: float) -> None:
        """There was none."""
        self._failures += 1
        if self._probing:
            self._probing = False
            self._wait = min(LONGEST_SECONDS, self._wait * 2)
            self._opened_until = now + self._wait
        elif self._failures >= FAILURES_MAX and self._opened_until is None:
            self._opened_until = now + self._wait

    def gave_up(self) -> None:
        """Nobody waited for the answer: it says nothing, and the next may probe."""
        self._probing = False
