"""`tidings renew-epochs`: after a restore that was made by other means than `tidings restore`."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from tidings.server.config import Config

from .datadir import COMMANDS_LOCK, hold
from .terminal import ConfigOption, DataDirOption, StoreOption, console, progress, settings

if TYPE_CHECKING:
    from tidings.server.store.base import Store, Tx

# Streams in one transaction: some tens of milliseconds.
STEP: Final = 500
# As those of streams that are made anew.
_EPOCH_BYTES: Final = 10


def renew_epochs(*, config: ConfigOption = None, data_dir: DataDirOption = None, store: StoreOption = None) -> None:
    """Tell clients that history may have been rolled back. No server may run on the data meanwhile.

    Do this after PostgreSQL was restored to a point in time, or failed over to a replica that may have lacked commits.
    Every stream gets a new epoch; at its next connection each client is told `epoch_changed`, drops what it has of a
    conversation and loads it again. `tidings restore` does it by itself. Running it twice does no harm.

    For example:

        tidings renew-epochs --store postgres://tidings@db.internal/tidings
    """
    where = settings(config, data_dir, store=store)
    with ExitStack() as held:
        if where.embedded:
            held.enter_context(hold(where.data_dir, "a renewal of epochs"))
            held.enter_context(hold(where.data_dir, "a renewal of epochs", lock=COMMANDS_LOCK))
        count = asyncio.run(_renew(where))
    console().print(f"[bold green]Renewed[/] the epochs of {count:,} streams.")


async def _renew(where: Config) -> int:
    from tidings.server.app import open_store

    store = (await open_store(where, on_bus=False)).store
    try:
        return await renew(store, time.time_ns() // 1_000_000)
    finally:
        await store.close()


async def renew(store: Store, now: int) -> int:
    """Give every stream another epoch and count it as moved at `now` (ms); how many. Raises StoreUnavailable."""

    async def total(tx: Tx) -> int:
        row = await tx.one("SELECT count(*) FROM streams")
        return int(row[0]) if row else 0

    done, last = 0, -1
    with progress() as bar:
        task = bar.add_task("New epochs", total=await store.read(total))
        while True:

            async def step(tx: Tx, after: int = last) -> list[int]:
                rows = await tx.all("SELECT sid FROM streams WHERE sid>? ORDER BY sid LIMIT ?", after, STEP)
                sids = [sid for (sid,) in rows]
                await tx.many(
                    "UPDATE streams SET epoch=?, moved_at=? WHERE sid=?",
                    [(base64.b32encode(os.urandom(_EPOCH_BYTES)).decode().lower(), now, sid) for sid in sids],
                )
                return sids

            sids = await store.run(step)
            if not sids:
                return done
            done, last = done + len(sids), sids[-1]
            bar.update(task, completed=done)
