"""How many type in a large channel: told as a number, because one by one it would cost the square of the membership.

Each node counts the users who type at its own sessions and tells the others that number, at most once a second and
channel; each adds up what it has heard and tells its own sessions the sum, as rarely. So a channel costs a node one
notice per other node and one write per connected socket in a second, however many type. A node that says nothing more
(it died, it is cut off) is left out of the sum when its number has lapsed. Who types at two nodes at once counts twice.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from tidings.server.bus.base import Crowd, Signal
from tidings.wire.codec import encode
from tidings.wire.commands import TypingSignal

if TYPE_CHECKING:
    from .connection import Connection
    from .gateway import Gateway

# How often a number is told at most in a channel, to sessions and to other nodes, seconds.
CROWD_SECONDS: Final = 1.0
# How long a number or somebody's typing counts unless it is renewed, milliseconds: the same as a name is shown.
CROWD_SHOWN_MS: Final = 6_000
# How often a number that does not change is told again, seconds: half the time it is shown, so that one may get lost.
CROWD_RENEW_SECONDS: Final = 3.0


class _Crowd:
    """One channel. Times are of the gateway's steady clock, in seconds."""

    __slots__ = ("counted", "counted_at", "elsewhere", "here", "told", "told_at")

    def __init__(self) -> None:
        # Sessions here whose user types, until when.
        self.here: dict[Connection, float] = {}
        # What other nodes count, until when.
        self.elsewhere: dict[str, tuple[int, float]] = {}
        # What the other nodes and the sessions here were told last, and when.
        self.counted = 0
        self.counted_at = 0.0
        self.told = 0
        self.told_at = 0.0


class Crowds:
    """The large channels of this node in which somebody types, by sid."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._clock = gateway.clock
        self._bus = gateway.bus
        self._loop = asyncio.get_running_loop()
        self._of: dict[int, _Crowd] = {}
        self._bus.listen(self._heard, Crowd)

    def __len__(self) -> int:
        return len(self._of)

    def joined(self, connection: Connection, sid: int) -> None:
        """The connection's user types in the channel from now on, or still."""
        self._crowd(sid).here[connection] = self._clock.monotonic() + CROWD_SHOWN_MS / 1000

    def left(self, connection: Connection, sid: int) -> bool:
        """The connection's user types no more there; whether they were counted."""
        crowd = self._of.get(sid)
        return crowd is not None and crowd.here.pop(connection, None) is not None

    def _heard(self, notice: Crowd) -> None:
        if notice.node == self._bus.node:
            return
        if notice.count or notice.sid in self._of:
            until = self._clock.monotonic() + CROWD_SHOWN_MS / 1000
            self._crowd(notice.sid).elsewhere[notice.node] = (notice.count, until)

    def _crowd(self, sid: int) -> _Crowd:
        crowd = self._of.get(sid)
        if crowd is None:
            crowd = self._of[sid] = _Crowd()
            # At the end of this tick: the first to type is shown at once, and whoever comes with them.
            self._loop.call_soon(self._turn, sid, crowd)
        return crowd

    def _turn(self, sid: int, crowd: _Crowd) -> None:
        """Tell what has changed, then wait: nothing else tells anything, so it is never more often."""
        now = self._clock.monotonic()
        for connection in [one for one, until in crowd.here.items() if until <= now]:
            del crowd.here[connection]
            connection.typing.pop(sid, None)
        for node in [node for node, (_, until) in crowd.elsewhere.items() if until <= now]:
            del crowd.elsewhere[node]
        here = len({connection.user for connection in crowd.here})
        total = here + sum(count for count, _ in crowd.elsewhere.values())
        if not total and not crowd.told and not crowd.counted:
            del self._of[sid]
            return
        if self._bus.node and _due(here, crowd.counted, now - crowd.counted_at):
            crowd.counted, crowd.counted_at = here, now
            self._bus.publish(Crowd(self._bus.node, sid, here))
        if _due(total, crowd.told, now - crowd.told_at):
            crowd.told, crowd.told_at = total, now
            self._tell(sid, total)
        self._loop.call_later(CROWD_SECONDS, self._turn, sid, crowd)

    def _tell(self, sid: int, total: int) -> None:
        hub = self._gateway.hub
        stream = hub.streams.get(sid)
        if stream is not None:
            signal = TypingSignal(
                channel=stream.name, count=total, on=total > 0, expires_in_ms=CROWD_SHOWN_MS if total else 0
            )
            # Not over the bus: every node tells its own.
            hub.notice(Signal(stream.app, encode(signal), sid=sid))


def _due(number: int, last: int, seconds: float) -> bool:
    return number != last or (number > 0 and seconds >= CROWD_RENEW_SECONDS)
