"""The outbox: what jobs have still to look at, written in the transaction of the event.

Nothing consumes it yet beyond this: without push and webhooks every row is done as soon as it is committed, and is
taken away in bulk so that the table stays empty.
"""

from __future__ import annotations

import asyncio
from typing import Final

from tidings.server.errors import StoreUnavailable
from tidings.server.store.base import Store, Tx

# Rows taken away at once, and how often: a delete of so many rows holds the writer for a few milliseconds.
TRIM_ROWS: Final = 5_000
TRIM_SECONDS: Final = 1.0


async def trim_outbox(store: Store) -> None:
    """Take away rows that nobody waits for, until cancelled."""

    async def unit(tx: Tx) -> int:
        newest = await tx.one("SELECT max(id), min(id) FROM outbox")
        if newest is None or newest[0] is None:
            return 0
        return await tx.execute("DELETE FROM outbox WHERE id<=?", min(int(newest[0]), int(newest[1]) + TRIM_ROWS - 1))

    async def empty(tx: Tx) -> bool:
        return await tx.one("SELECT 1 FROM outbox LIMIT 1") is None

    while True:
        await asyncio.sleep(TRIM_SECONDS)
        try:
            while not await store.read(empty):
                if await store.run(unit) < TRIM_ROWS:
                    break
        except StoreUnavailable:
            continue
