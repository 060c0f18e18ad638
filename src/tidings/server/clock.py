"""Time and identifiers. Both come in through constructors, so that tests can choose them.

Times inside the server are integers: milliseconds since the Unix epoch, UTC.
"""

import base64
import os
import time
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["Clock", "Ids", "ManualClock", "SystemClock", "message_id_time_ms"]

# Crockford's base 32: no I, L, O or U, and in the order of their codes, so that texts sort like the numbers.
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
# Two characters at a time: ten bits, a table of 1,024.
_PAIRS: Final = tuple(high + low for high in _ALPHABET for low in _ALPHABET)


class Clock(Protocol):
    """What tells the time."""

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC. May jump when the machine's clock is set."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment. Never goes back: for durations and deadlines."""
        ...


class SystemClock:
    """The machine's own clocks."""

    __slots__ = ()

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds of CLOCK_MONOTONIC."""
        return time.monotonic()


class ManualClock:
    """A clock for tests: stands still until told."""

    __slots__ = ("_monotonic", "_now_ms")

    def __init__(self, now_ms: int = 1_700_000_000_000, monotonic: float = 0.0) -> None:
        self._now_ms = now_ms
        self._monotonic = monotonic

    def now_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC, as last set."""
        return self._now_ms

    def monotonic(self) -> float:
        """Seconds advanced so far, plus where it started."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let both clocks move on by `seconds`, to the millisecond. Raises ValueError for a negative time."""
        if seconds < 0:
            raise ValueError("time does not go back; set_wall() sets the wall clock")
        self._now_ms += round(seconds * 1000)
        self._monotonic += seconds

    def set_wall(self, now_ms: int) -> None:
        """Set the wall clock alone, as an operator or NTP does; it may go back."""
        self._now_ms = now_ms


class Ids:
    """Makes identifiers. For one thread: two threads take one each.

    `randomness(n)` gives n bytes, unpredictable ones in production: secrets are made from it too.
    """

    __slots__ = ("_clock", "_counter", "_ms", "_prefix", "_randomness")

    # Thirty bits count within one millisecond; they start in the lower half, which leaves 2**29 steps of room.
    _COUNTER_END = 1 << 30

    def __init__(self, clock: Clock, randomness: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._randomness = randomness
        self._ms = -1
        self._prefix = ""
        self._counter = 0

    def new_message_id(self) -> str:
        """`m_` and 26 characters that sort by time; greater than every earlier one of this object.

        48 bits of milliseconds, 50 random ones, and 30 that count up within the millisecond. A clock that goes back
        does not: the last millisecond is continued. Unique between processes by the random bits; not a secret.
        """
        ms = self._clock.now_ms()
        counter = self._counter + 1
        if ms > self._ms or counter == self._COUNTER_END:
            self._ms = ms = max(ms, self._ms + 1)
            noise = int.from_bytes(self._randomness(10))
            self._prefix = f"m_{_encode(ms, 10)}{_encode(noise & (1 << 50) - 1, 10)}"
            counter = noise >> 51 & (1 << 29) - 1
        self._counter = counter
        return f"{self._prefix}{_PAIRS[counter >> 20]}{_PAIRS[counter >> 10 & 1023]}{_PAIRS[counter & 1023]}"

    def new_id(self, prefix: str) -> str:
        """`prefix` and 26 lower-case characters (a-z, 2-7): 128 random bits. For channels (`ch_`), apps (`app_`) …"""
        return prefix + base64.b32encode(self._randomness(16)).decode().rstrip("=").lower()

    def new_secret(self) -> str:
        """43 characters (A-Z, a-z, 0-9, - and _): 256 random bits. For API keys and app secrets."""
        return base64.urlsafe_b64encode(self._randomness(32)).decode().rstrip("=")

    def random_bytes(self, count: int) -> bytes:
        """`count` bytes from the source of randomness."""
        return self._randomness(count)


def _encode(number: int, length: int) -> str:
    """`number` in `length` characters (an even count) of Crockford's base 32, padded with zeros."""
    pairs = [_PAIRS[number >> shift & 1023] for shift in range(length * 5 - 10, -1, -10)]
    return "".join(pairs)


def message_id_time_ms(message_id: str) -> int:
    """When `new_message_id` made it, in ms since 1970. Raises ValueError for anything else, such as an app's own id."""
    if len(message_id) != 28 or not message_id.startswith("m_") or not set(message_id[2:]) <= set(_ALPHABET):
        raise ValueError("not a message id made by the server")
    number = 0
    for character in message_id[2:12]:
        number = number << 5 | _ALPHABET.index(character)
    return number
