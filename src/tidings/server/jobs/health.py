"""The store's health as a number: asked every few seconds, whether or not anybody asks for readiness."""

from __future__ import annotations

import asyncio
from typing import Final

from tidings.server.clock import Clock
from tidings.server.store.base import Row, Store, Tx
from tidings.server.telemetry import Metrics, get_logger

log = get_logger(__name__)

# Often enough for an alert within half a minute; one row costs nothing.
PROBE_SECONDS: Final = 5.0
# A store that needs longer than this for one row serves nobody.
PROBE_SECONDS_MAX: Final = 2.0


async def probe_store(store: Store, metrics: Metrics, clock: Clock) -> None:
    """Keep `store_up` and `store_probe_seconds` current, until cancelled."""

    async def unit(tx: Tx) -> Row | None:
        return await tx.one("SELECT 1")

    while True:
        began = clock.monotonic()
        try:
            async with asyncio.timeout(PROBE_SECONDS_MAX):
                await store.read(unit)
        except Exception as error:
            if metrics.store_up.value:
                log.warning("store.down", error=type(error).__name__)
            metrics.store_up.value = 0
        else:
            metrics.store_up.value = 1
        # A failure counts with what it took: a store that hangs is not a fast one.
        metrics.store_probe_seconds.observe(clock.monotonic() - began)
        await asyncio.sleep(PROBE_SECONDS)
