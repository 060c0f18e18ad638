"""What was read on one device is taken away from the others: the job that sees to it is put with the read position."""

from __future__ import annotations

from typing import Final

from tidings.server.store.base import Tx

from .queue import Put, put

CLEAR: Final = "push.clear"
# Whoever reads goes on reading: one push for what is read within so long, ms.
GATHER_MS: Final = 3_000


async def put_clearing(tx: Tx, app: int, sid: int, user: str, now: int) -> None:
    """Put the job, for those who can be woken at all. In the unit that moves the read position."""
    if await tx.one("SELECT 1 FROM push_tokens t WHERE t.app=? AND t.user=? LIMIT 1", app, user) is not None:
        await put(tx, [Put(CLEAR, f"{sid}/{user}", app, now + GATHER_MS)], now=now)
