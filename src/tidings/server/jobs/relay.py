"""The relay: events leave the outbox, and what has to be done about them becomes jobs, in one transaction.

An event's row in the outbox is written with the event. The relay takes rows away and lets each reader (webhooks, push
…) put jobs for them before it commits: neither a row nor a job can be lost or doubled in between. Rows of one stream
come in the order of `seq`, because whoever appends holds the stream's row, and one relay works at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from tidings.server.bus.base import Bus, Published
from tidings.server.clock import Clock
from tidings.server.errors import StoreUnavailable
from tidings.server.services.queue import Put, put
from tidings.server.store.base import Store, Tx
from tidings.server.telemetry import Metrics

# Events taken at once: reading and deleting so many holds an embedded writer for some ten milliseconds.
ROWS_MAX: Final = 2_000
# How long events collect, seconds: a webhook need not be faster, and a busy server does the work once for many.
GATHER_SECONDS: Final = 0.05
# How often the outbox is looked at without being told: what a node that died has left, and what commands do.
POLL_SECONDS: Final = 1.0
# The row of `meta` that is locked by the node whose turn it is.
TURN: Final = "outbox:relay"


class OutboxRow(NamedTuple):
    """One event that jobs have still to look at."""

    app: int
    sid: int
    seq: int
    type: str


class Reader(Protocol):
    """Makes jobs of events."""

    async def read(self, tx: Tx, rows: Sequence[OutboxRow], now: int) -> Sequence[Put]:
        """The jobs to put for these events, which are in the order of `seq` per stream; `now` is ms. It runs inside the
        transaction (in the store's thread): it may only ask `tx`."""
        ...


class Relay:
    """Empties the outbox into the readers' jobs."""

    def __init__(
        self,
        store: Store,
        readers: Sequence[Reader],
        bus: Bus,
        clock: Clock,
        metrics: Metrics,
        *,
        wake: Callable[[], None] | None = None,
    ) -> None:
        """`wake` is called when there are new jobs."""
        self._store = store
        self._readers = readers
        self._clock = clock
        self._metrics = metrics
        self._told = wake
        self._grown = asyncio.Event()
        bus.listen(self._heard, Published)

    def _heard(self, _notice: object) -> None:
        self._grown.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                while await self.turn() == ROWS_MAX:
                    await asyncio.sleep(0)
            except StoreUnavailable:
                await asyncio.sleep(POLL_SECONDS)  # why: nobody tells when a store comes back
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._grown.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(GATHER_SECONDS)

    async def turn(self) -> int:
        """Hand on what is there, at most `ROWS_MAX` events; how many. Raises StoreUnavailable."""
        self._grown.clear()

        async def waiting(tx: Tx) -> bool:
            return await tx.one("SELECT 1 FROM outbox LIMIT 1") is not None

        if not await self._store.glance(waiting):
            return 0
        count, jobs = await self._store.run(self._take)
        self._metrics.outbox_rows.value += count
        if jobs and self._told is not None:
            self._told()
        return count

    async def _take(self, tx: Tx) -> tuple[int, int]:
        if tx.claiming:
            # One at a time: an event that was overtaken by a later one of its stream would look as if it had been seen.
            await tx.execute("INSERT INTO meta(name,value) VALUES (?,'') ON CONFLICT (name) DO NOTHING", TURN)
            if await tx.one("SELECT 1 FROM meta WHERE name=?" + tx.claiming, TURN) is None:
                return 0, 0
        rows = await tx.all("SELECT id,app,sid,seq,type FROM outbox ORDER BY id LIMIT ?", ROWS_MAX)
        if not rows:
            return 0, 0
        taken = [OutboxRow(*row[1:]) for row in rows]
        now = self._clock.now_ms()
        puts: list[Put] = []
        for reader in self._readers:
            puts += await reader.read(tx, taken, now)
        if puts:
            await put(tx, puts, now=now)
        # By their numbers: one that was numbered before these may be committed after them.
        if tx.claiming:
            await tx.execute("DELETE FROM outbox WHERE id=ANY(CAST(? AS BIGINT[]))", [row[0] for row in rows])
        else:
            await tx.execute("DELETE FROM outbox WHERE id>=? AND id<=?", rows[0][0], rows[-1][0])
        return len(rows), len(puts)
