"""Among other nodes: what one does so that its users need not know that there are several.

Followed streams are compared with the store: when interest in them is known to be in place, once more when it is known
at every server of the bus for certain, and from then on in turns, so that an event whose announcement was lost is found
although nothing follows it. After a loss that the bus has noticed, and once a second while this node is cut off,
nothing that is remembered counts, and all streams are compared at once. docs/decisions/0014-nats.md has the reasoning.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from tidings.server.bus.base import Arrived, Joined, Left, Lost, Notice, Used
from tidings.server.errors import Refusal
from tidings.server.store.log import count_generation
from tidings.server.telemetry import get_logger

if TYPE_CHECKING:
    from .connection import Connection
    from .gateway import Gateway

log = get_logger(__name__)

# How often streams are compared in turns, seconds, and how many of them at most: a lost last event is found within as
# many seconds as there are turns in a round. 60,000 streams are two turns, 90,000 three; whoever follows more finds
# what was lost later. What it costs: `make bench ARGS="healing"`.
TURN_SECONDS: Final = 1.0
TURNS_MIN: Final = 2
TURN_STREAMS_MAX: Final = 30_000
# Streams that long polls wait for, compared each second.
POLLED_MAX: Final = 5_000
# How long after following it a stream is compared once more, seconds: by then every server of the bus has long been
# told of the interest.
CERTAIN_SECONDS: Final = 1.0
# What the store knows and we do not may be on its way: so long is waited for it, seconds, before the log is read.
IN_FLIGHT_SECONDS: Final = 0.25
# How often what credentials have used is told to the other nodes, seconds. Two nodes together let through at most
# this much more than one.
SHARE_SECONDS: Final = 0.25
# Credentials in one such notice: 50 bytes each.
SHARE_MAX: Final = 1_000
# A session that is older than this by our own clock has been replaced by one that has just arrived elsewhere, whatever
# the other node's clock says, seconds.
SKEW_SECONDS: Final = 5.0


class Nodes:
    """This node's view of the others."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._bus = gateway.bus
        self._loop = asyncio.get_running_loop()
        # Streams followed since they were last compared.
        self._fresh: list[int] = []
        self._settling: asyncio.Task[None] | None = None
        # When streams are to be compared once more.
        self._again: deque[tuple[float, list[int]]] = deque()
        # What is left of this round of turns, and how many a turn takes.
        self._round: list[int] = []
        self._per_turn = 0
        self._lost = False
        self._cut_off = False
        self._bus.listen(self._heard, Lost, Arrived, Joined, Left, Used)

    def start(self) -> None:
        """Begin to compare and to share."""
        tasks = self._gateway.tasks
        tasks.spawn(self._take_turns(), "compare with the store")
        tasks.spawn(self._share(), "share usage")

    # ------------------------------------------------------------ interest

    def follow(self, sid: int) -> None:
        """Somebody here listens to the stream from now on."""
        self._bus.follow(sid)
        self._fresh.append(sid)
        if self._settling is None:
            self._settling = self._gateway.tasks.spawn(self._settle(), "settle")

    def unfollow(self, sid: int) -> None:
        """Nobody here listens to it any more."""
        self._bus.unfollow(sid)

    def attend(self, app: int, user: str) -> None:
        """The user's first session is here."""
        self._bus.attend(app, user)

    def unattend(self, app: int, user: str) -> None:
        """The user's last session here has gone."""
        self._bus.unattend(app, user)

    async def _settle(self) -> None:
        """What was published before our interest was known has been committed before that: heads that are read after it
        tell whether there was something. As many streams as have collected share one question and one read."""
        try:
            while self._fresh:
                fresh, self._fresh = self._fresh, []
                if await self._bus.settle():
                    try:
                        await self.compare(fresh)
                    except Refusal as refusal:
                        # The store cannot say now; the second look will.
                        log.warning("compare_failed", code=refusal.code)
                self._again.append((self._loop.time() + CERTAIN_SECONDS, fresh))
        finally:
            self._settling = None

    # ------------------------------------------------------------ comparing

    async def compare(self, sids: list[int]) -> None:
        """See whether streams have grown without a word. Raises StoreUnavailable."""
        hub = self._gateway.hub
        ahead = hub.ahead(await self._gateway.sync.grown(hub.heads(sids)))
        if ahead:
            await asyncio.sleep(IN_FLIGHT_SECONDS)
            self._gateway.metrics.bus_healed.inc(hub.recheck(ahead))

    async def _take_turns(self) -> None:
        while True:
            await asyncio.sleep(TURN_SECONDS)
            try:
                await self.turn()
            except Refusal as refusal:
                log.warning("compare_failed", code=refusal.code)

    async def turn(self) -> None:
        """One turn. Raises StoreUnavailable: then what was to be done is still to be done."""
        sync = self._gateway.sync
        if polled := sync.polled[:POLLED_MAX]:
            sync.compare_polled(await sync.heads_of(polled))
        cut_off = not self._bus.connected
        if cut_off and not self._cut_off:
            # What we said last may have reached nobody, and may have been about who sees what.
            await self._gateway.services.store.run(count_generation)
        if cut_off or self._cut_off or self._lost:
            self._lost = True
            self._cut_off = cut_off
            await self._gateway.changed_elsewhere()
            self._lost = False
            return
        due = self._loop.time()
        while self._again and self._again[0][0] <= due:
            await self.compare(self._again[0][1])
            self._again.popleft()
        if not self._round:
            self._round = list(self._gateway.hub.streams)
            self._per_turn = min(TURN_STREAMS_MAX, -(-len(self._round) // TURNS_MIN))
        if self._round:
            await self.compare(self._round[-self._per_turn :])
            del self._round[-self._per_turn :]

    # ------------------------------------------------------------ what others say

    def _heard(self, notice: Notice) -> None:
        if isinstance(notice, Lost):
            self._lost = True
        elif isinstance(notice, Arrived):
            self._arrived(notice)
        elif isinstance(notice, Joined | Left):
            # Two nodes may have changed the same membership, and what they say come in another order than it was done.
            # It counts at once, and then the store is asked.
            subscriber = self._gateway.hub.users.get((notice.app, notice.user or ""))
            if subscriber is not None and self._bus.node:
                self._gateway.doubts.about_memberships(subscriber)
        elif isinstance(notice, Used) and notice.node != self._bus.node:
            limiter, now = self._gateway.limiter, self._gateway.clock.monotonic()
            for app, via, units in notice.taken:
                limiter.charge((app, via), units, now)

    def arrived(self, connection: Connection) -> None:
        """A device has connected here: its sessions on other nodes end. Told again when their interest is known."""
        self._tell_arrived(connection)
        self._loop.call_later(CERTAIN_SECONDS, self._tell_arrived, connection)

    def _tell_arrived(self, connection: Connection) -> None:
        if not connection.ended:
            self._bus.publish(
                Arrived(connection.app, connection.user, connection.device, connection.id, connection.connected_at_ms)
            )

    def _arrived(self, notice: Arrived) -> None:
        older = self._gateway.device(notice.app, notice.user, notice.device)
        if older is None or older.id == notice.session:
            return
        # Both may have connected at the same moment, and both nodes hear of the other: one of them stays, the same one
        # for both. The clocks that order them may differ, so who has been here for a while is the older one anyway.
        if (older.connected_at_ms, older.id) < (notice.at_ms, notice.session) or (
            self._gateway.clock.monotonic() - older.connected_at > SKEW_SECONDS
        ):
            older.close(Refusal("replaced", "This device has connected again."))

    # ------------------------------------------------------------ rates

    async def _share(self) -> None:
        while True:
            await asyncio.sleep(SHARE_SECONDS)
            self.share()

    def share(self) -> None:
        """Tell the others what credentials have used here."""
        taken = []
        for (app, via), units in self._gateway.limiter.take_usage(self._gateway.clock.monotonic()):
            taken.append((app, via, units))
        for start in range(0, len(taken), SHARE_MAX):
            self._bus.publish(Used(self._bus.node, taken[start : start + SHARE_MAX]))
