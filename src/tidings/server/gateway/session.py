"""A session: what one connection may do next, as a state machine without I/O.

It takes bytes and the time and gives back what to do: run a command, answer a refusal, close. It never waits, so its
tests need no loop, no socket and no clock.

    WAITING --connect--> CONNECTING --connected()--> OPEN --close/expiry/silence--> CLOSED
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, TypeAlias

import msgspec

from tidings.server.errors import Refusal
from tidings.wire.codec import decode_command
from tidings.wire.commands import AnyCommand, Connect, Ping
from tidings.wire.problems import CATALOGUE

# Frames in a row that cannot be read before the connection is given up: a client with a bug floods otherwise.
GARBAGE_MAX: Final = 20
# Silence is counted in heartbeats: one may be lost on a bad link, two mean that nobody is there.
SILENT_HEARTBEATS_MAX: Final = 2
# Control frames (pings, pongs) per second a client may send: browsers send none, libraries one per 20 s.
CONTROL_FRAMES_PER_SECOND: Final = 10.0
CONTROL_FRAMES_BURST: Final = 50.0


class State(Enum):
    WAITING = auto()
    CONNECTING = auto()
    OPEN = auto()
    CLOSED = auto()


class Run(msgspec.Struct, frozen=True):
    """Execute a command."""

    command: AnyCommand


@dataclass(slots=True, frozen=True)
class Answer:
    """Answer with a refusal; the connection stays."""

    refusal: Refusal
    ref: int | None


@dataclass(slots=True, frozen=True)
class Close:
    """Answer with a refusal, then close with its close code."""

    refusal: Refusal
    ref: int | None = None

    @property
    def code(self) -> int:
        return CATALOGUE[self.refusal.code].close or 4002


Action: TypeAlias = Run | Answer | Close


@dataclass(slots=True, frozen=True)
class SessionLimits:
    """Bounds of one session; see the configuration for their reasons."""

    auth_timeout_seconds: float = 5.0
    heartbeat_seconds: float = 25.0
    commands_per_second: float = 50.0
    commands_burst: float = 200.0
    in_flight_max: int = 256
    frame_bytes_max: int = 131_072


class _Bucket:
    """A token bucket."""

    __slots__ = ("burst", "level", "rate", "seen")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate, self.burst, self.level, self.seen = rate, burst, burst, now

    def take(self, now: float) -> float:
        """Take one token; 0, or the seconds until there is one."""
        level = min(self.burst, self.level + (now - self.seen) * self.rate)
        self.seen = now
        if level < 1.0:
            self.level = level
            return (1.0 - level) / self.rate
        self.level = level - 1.0
        return 0.0


class Session:
    """The state of one connection. `now` is monotonic seconds, the same clock throughout."""

    __slots__ = (
        "_commands",
        "_control",
        "_garbage",
        "authenticated_at",
        "expires_at",
        "heard_at",
        "in_flight",
        "issued_at_ms",
        "jti",
        "limits",
        "opened_at",
        "state",
    )

    def __init__(self, limits: SessionLimits, now: float) -> None:
        self.limits = limits
        self.state = State.WAITING
        self.opened_at = now
        self.heard_at = now
        # When the token ends, monotonic; None: with the connection (an API key's).
        self.expires_at: float | None = None
        self.issued_at_ms: int | None = None
        self.jti: str | None = None
        self.in_flight = 0
        self._garbage = 0
        self._commands = _Bucket(limits.commands_per_second, limits.commands_burst, now)
        self._control: _Bucket | None = None

    # ------------------------------------------------------------ inputs

    def receive(self, data: bytes, now: float) -> Action | None:
        """A text frame (or one reassembled message) has come. None: nothing to do."""
        self.heard_at = now
        state = self.state
        if state is State.CLOSED:
            return None
        if len(data) > self.limits.frame_bytes_max:
            return self._close(
                Refusal(
                    "too_large",
                    f"The frame is {len(data)} bytes; at most {self.limits.frame_bytes_max} are allowed.",
                    bound=self.limits.frame_bytes_max,
                )
            )
        try:
            command = decode_command(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return self._unreadable(data, error, now)
        self._garbage = 0
        if state is State.OPEN:
            if isinstance(command, Connect):
                return Answer(Refusal("conflict", "This connection is connected already."), command.ref)
            limited = self._limited(now)
            if limited is not None:
                return Answer(limited, command.ref)
            if self.in_flight >= self.limits.in_flight_max and not isinstance(command, Ping):
                return Answer(
                    Refusal(
                        "too_many_in_flight",
                        f"At most {self.limits.in_flight_max} commands may wait for their replies.",
                        bound=self.limits.in_flight_max,
                        retry_after_ms=1000,
                    ),
                    command.ref,
                )
            self.in_flight += 1
            return Run(command)
        if state is State.CONNECTING:
            # A client may send on without waiting for `connected`; the shell keeps the order.
            if isinstance(command, Connect):
                return Answer(Refusal("conflict", "This connection is connecting already."), command.ref)
            if self.in_flight >= self.limits.in_flight_max:
                return self._close(Refusal("too_many_in_flight", "Too much was sent before `connected`."), command.ref)
            self.in_flight += 1
            return Run(command)
        if not isinstance(command, Connect):
            return self._close(Refusal("unauthenticated", "The first frame must be `connect`."), command.ref)
        self.state = State.CONNECTING
        self.in_flight += 1
        return Run(command)

    def control(self, now: float) -> Close | None:
        """A ping or pong has come."""
        self.heard_at = now
        if self._control is None:
            self._control = _Bucket(CONTROL_FRAMES_PER_SECOND, CONTROL_FRAMES_BURST, now)
        if self._control.take(now):
            return self._close(Refusal("rate_limited", "Too many control frames."))
        return None

    def connected(self, now: float, *, expires_at: float | None, issued_at_ms: int | None, jti: str | None) -> None:
        """The `connect` command was granted."""
        self.state = State.OPEN
        self.authorised(expires_at=expires_at, issued_at_ms=issued_at_ms, jti=jti)
        self.heard_at = now

    def authorised(self, *, expires_at: float | None, issued_at_ms: int | None, jti: str | None) -> None:
        """A token was accepted: the session lives until it expires."""
        self.expires_at = expires_at
        self.issued_at_ms = issued_at_ms
        self.jti = jti

    def answered(self) -> None:
        """A command's reply has gone out."""
        self.in_flight -= 1

    def tick(self, now: float) -> Close | None:
        """Time has passed."""
        if self.state is State.CLOSED:
            return None
        if self.state is not State.OPEN:
            if now - self.opened_at >= self.limits.auth_timeout_seconds:
                return self._close(
                    Refusal("auth_timeout", f"No valid `connect` within {self.limits.auth_timeout_seconds:g} seconds.")
                )
            return None
        if self.expires_at is not None and now >= self.expires_at:
            return self._close(Refusal("token_expired", "The token has expired."))
        if now - self.heard_at >= SILENT_HEARTBEATS_MAX * self.limits.heartbeat_seconds:
            return self._close(Refusal("heartbeat_timeout", "Nothing was heard for two heartbeats."))
        return None

    def next_tick(self) -> float:
        """When `tick` has something to say at the earliest, if nothing is heard until then."""
        if self.state is not State.OPEN:
            return self.opened_at + self.limits.auth_timeout_seconds
        due = self.heard_at + SILENT_HEARTBEATS_MAX * self.limits.heartbeat_seconds
        return due if self.expires_at is None else min(due, self.expires_at)

    def closed(self) -> None:
        """The connection is gone."""
        self.state = State.CLOSED

    # ------------------------------------------------------------ refusals

    def _close(self, refusal: Refusal, ref: int | None = None) -> Close:
        self.state = State.CLOSED
        return Close(refusal, ref)

    def _limited(self, now: float) -> Refusal | None:
        """Take one command's worth of the rate."""
        wait = self._commands.take(now)
        if not wait:
            return None
        return Refusal(
            "rate_limited",
            f"At most {self.limits.commands_per_second:g} commands a second.",
            retry_after_ms=int(wait * 1000) + 1,
        )

    def _unreadable(self, data: bytes, error: Exception, now: float) -> Action:
        if self.state is State.OPEN and isinstance(error, msgspec.ValidationError):
            # Finding out what is wrong with a command costs no less than running it.
            return Answer(self._limited(now) or refusal_of(error), _ref_of(data))
        refusal = refusal_of(error)
        self._garbage += 1
        if self.state is not State.OPEN or self._garbage >= GARBAGE_MAX:
            return self._close(Refusal("invalid", refusal.detail, field=refusal.field), _ref_of(data))
        return Answer(refusal, None)


class _OnlyRef(msgspec.Struct):
    ref: int | None = None


_decode_ref: Final = msgspec.json.Decoder(_OnlyRef).decode
# msgspec ends its messages with the path of what it stumbled over.
_PATH: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?:\$\.?)?(?P<path>[^`]*)`)?$", re.DOTALL)
_UNKNOWN: Final = re.compile(r"unknown field `([^`]*)`")
_MISSING: Final = re.compile(r"missing required field `([^`]*)`")
_BOUND: Final = re.compile(r"(?:of length )?[<>]=? (\d+)")


def _ref_of(data: bytes) -> int | None:
    try:
        return _decode_ref(data).ref
    except Exception:
        return None


def refusal_of(error: Exception) -> Refusal:
    """What was wrong with a document, with the path of the field: `attachments[2].url`."""
    if not isinstance(error, msgspec.ValidationError):
        return Refusal("invalid", "This is not JSON.")
    found = _PATH.match(str(error))
    what = found["what"] if found else str(error)
    path = (found["path"] or "") if found else ""
    named = _UNKNOWN.search(what) or _MISSING.search(what)
    if named:
        path = f"{path}.{named[1]}" if path else named[1]
    bound = _BOUND.search(what)
    return Refusal("invalid_field", f"{what}.", field=path or None, bound=int(bound[1]) if bound else None)
