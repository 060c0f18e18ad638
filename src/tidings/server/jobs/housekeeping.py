"""What grows by itself is cut back: the logs of webhooks and pushes, after some days."""

from __future__ import annotations

from typing import Final

from tidings.server.clock import Clock
from tidings.server.services.queue import BULK, Job, Put, put
from tidings.server.store.base import Store, Tx

from .worker import Again, Kind, Outcome

HOUSEKEEPING: Final = "housekeeping"
# How often, ms.
EVERY_MS: Final = 3_600_000
# Rows taken away in one transaction, which others wait for: some ten milliseconds.
ROWS_MAX: Final = 1_000
# The key of each log, of which the oldest rows go.
_LOGS: Final = {
    "webhook_deliveries": "app,webhook,id",
    "push_log": "app,sid,seq,user,device,id",
}


async def start_housekeeping(store: Store, clock: Clock) -> None:
    """Put the job that keeps putting itself. Once for all processes: it has one key."""

    async def unit(tx: Tx) -> None:
        await put(tx, [Put(HOUSEKEEPING, "logs", priority=BULK)], now=clock.now_ms())

    await store.run(unit)


def housekeeping_kind(store: Store, clock: Clock, keep_days: int) -> Kind:
    """The kind of job that does it."""

    async def cut(_job: Job) -> Outcome:
        before = clock.now_ms() - keep_days * 24 * 3_600 * 1_000
        for table, key in _LOGS.items():
            columns = ",".join(f'"{name}"' for name in key.split(","))

            async def unit(tx: Tx, table: str = table, columns: str = columns) -> int:
                return await tx.execute(
                    f"DELETE FROM {table} WHERE ({columns}) IN (SELECT {columns} FROM {table} WHERE at<? LIMIT ?)",
                    before,
                    ROWS_MAX,
                )

            while await store.run(unit) == ROWS_MAX:
                pass
        return Again(due_at=clock.now_ms() + EVERY_MS, attempts=1)

    return Kind(HOUSEKEEPING, cut, concurrency=1, seconds_max=600.0)
